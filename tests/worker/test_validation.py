"""Validation of claimed jobs, with a real tokenizer and storage: what is settled, and every way in which a job fails."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from core.base_models import BaseModelEntry
from core.database import Database
from core.jobs.transitions import claim_for_validation, request_cancellation
from core.settings import Settings
from core.tables.jobs import Job, JobEvent
from sdft_engine.contract.machine_clock import machine_seconds
from tests.rows import assert_sound, get_job, messages_of
from tests.worker.conftest import Workshop, demonstration_file, demonstration_line, workshop_of
from tests.worker.test_supervisor import wait_for
from worker import validation
from worker.validation import validate

LONG = demonstration_line("What? " * 400, "Too long.")


def sdft(**hyperparameters: Any) -> dict[str, Any]:
    return {"type": "sdft", "sdft": {"hyperparameters": hyperparameters, "teacher_template": "example"}}


def validate_next(workshop: Workshop) -> None:
    claimed_at = machine_seconds()
    with workshop.database.transaction() as session:
        claim = claim_for_validation(session, workshop.resources.settings.lease_seconds)
    assert claim is not None
    validate(workshop.resources, claim, claimed_at)


def outcome(workshop: Workshop, **job: Any) -> Job:
    job_id = workshop.add_job("validating_files", **job)
    validate_next(workshop)
    assert_sound(workshop.database, job_id)
    return get_job(workshop.database, job_id)


def failure(workshop: Workshop, **job: Any) -> dict[str, Any]:
    failed = outcome(workshop, **job)
    assert failed.status == "failed"
    assert failed.error is not None
    return failed.error


def test_a_job_that_fits_is_queued_with_numbers_for_everything_automatic(workshop: Workshop) -> None:
    job = outcome(workshop, method=sdft())
    resolved = job.resolved_hyperparameters
    assert job.status == "queued"
    assert resolved is not None
    assert (resolved["batch_size"], resolved["n_epochs"]) == (8, 50)
    assert job.total_steps == 75  # 12 rows x 50 epochs / 8
    assert {name for name, value in resolved.items() if value == "auto"} == {"temperature", "mask_clipped_completions"}, "the trainer settles these"
    assert 16 <= resolved["max_completion_tokens"] <= 40
    assert "Files validated, moving job to queued state" in messages_of(workshop.database, job.id)


def test_a_supervised_job_is_queued(workshop: Workshop) -> None:
    job = outcome(workshop, method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 5}}})
    assert job.status == "queued"
    assert job.total_steps == 5  # 24 rows in batches of 5
    assert job.resolved_hyperparameters is not None
    assert "temperature" not in job.resolved_hyperparameters


def test_rows_that_do_not_fit_are_named_by_line(workshop: Workshop) -> None:
    error = failure(workshop, content=demonstration_file() + LONG + b"\n" + demonstration_file(2) + LONG + b"\n", method=sdft())
    assert (error["code"], error["param"]) == ("context_length_exceeded", "training_file")
    assert error["message"].startswith("line 13 (also 16): the teacher's prompt has ")
    assert "the context holds 512" in error["message"]
    assert [problem["line"] for problem in error["problems"]] == [13, 16]


def test_a_hundred_problems_are_listed_and_all_are_counted(workshop: Workshop) -> None:
    error = failure(workshop, content=(LONG + b"\n") * 130, method=sdft())
    assert len(error["problems"]) == 100
    assert error["message"].endswith("; and 30 more")


def test_an_explicit_completion_length_counts(workshop: Workshop) -> None:
    assert failure(workshop, method=sdft(max_completion_tokens=500))["code"] == "context_length_exceeded"


def test_dropped_rows_are_reported_never_silent(workshop: Workshop) -> None:
    content = LONG + b"\n" + demonstration_file() + LONG + b"\n"
    job = outcome(workshop, content=content, method=sdft(over_length="drop", n_epochs=1, batch_size=4))
    assert job.status == "queued"
    assert job.total_steps == 3
    with workshop.database.reading() as session:
        event = session.scalars(select(JobEvent).where(JobEvent.job_id == job.id, JobEvent.level == "warn")).one()
    assert event.message == "2 of 14 rows of the training file don't fit the context and are left out: lines 1, 14"
    assert event.data == {"param": "training_file", "dropped": 2, "lines": [1, 14]}


def test_rows_too_long_to_be_counted_are_dropped_like_the_others(workshop: Workshop) -> None:
    content = demonstration_file(5) + demonstration_line("x" * 500_000, "Never counted.") + b"\n" + demonstration_file(5) + LONG + b"\n"
    job = outcome(workshop, content=content, method=sdft(over_length="drop", n_epochs=1, batch_size=5))
    assert (job.status, job.total_steps) == ("queued", 2)
    assert "2 of 12 rows of the training file don't fit the context and are left out: lines 6, 12" in messages_of(workshop.database, job.id)
    error = failure(workshop, content=content, method=sdft())
    assert [(problem["line"], problem["code"]) for problem in error["problems"]] == [(6, "context_length_exceeded"), (12, "context_length_exceeded")]


def test_conversations_that_the_model_can_not_be_shown_fail_the_job(workshop: Workshop) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "[" * 100_000 + "]" * 100_000}}
    messages = [{"role": "user", "content": "Which lamp?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    error = failure(workshop, content=demonstration_file() + json.dumps({"messages": messages}).encode() + b"\n", method=sdft())
    assert (error["code"], error["param"]) == ("unsupported_conversation", "training_file")
    assert error["message"] == "line 13: the arguments of a tool call are JSON nested deeper than 64 levels"


def test_too_few_rows_left_fail_the_job(workshop: Workshop) -> None:
    error = failure(workshop, content=demonstration_file(9) + LONG + b"\n", method=sdft(over_length="drop"))
    assert (error["code"], error["param"]) == ("invalid_n_examples", "training_file")
    assert error["message"] == "a training file needs at least 10 usable examples, and 9 are left without line 10"


def test_lines_are_checked_again(workshop: Workshop) -> None:
    error = failure(workshop, content=demonstration_file() + b'{"messages": []}\nnot json\n')
    assert error["code"] == "missing_messages_list"
    assert error["message"].startswith('line 13: "messages" must be a non-empty list; line 14: not valid JSON')


def test_a_long_line_across_many_chunks_is_one_line(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.storage.CHUNK_BYTES", 7)
    assert outcome(workshop, content=demonstration_file().removesuffix(b"\n")).total_steps == 75


def test_validation_rows_are_checked_by_their_own_name(workshop: Workshop) -> None:
    too_long = workshop.add_file(demonstration_file(2) + LONG)
    error = failure(workshop, validation_file_id=too_long)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "validation_file")
    assert error["message"].startswith("line 3: the prompt has ")
    assert outcome(workshop, validation_file_id=workshop.add_file(demonstration_file(1))).status == "queued"


def with_questions(file_id: str) -> dict[str, Any]:
    return {"type": "sdft", "sdft": {"hyperparameters": {}, "teacher_template": "example", "retention_file": file_id}}


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ({"probe": "sums", "question": "1+1?"}, "answers: Field required"),
        ({"probe": "sums", "question": "What? " * 400, "answers": ["2"]}, "it needs "),
    ],
)
def test_general_questions_that_cannot_be_asked_fail_the_job(workshop: Workshop, question: dict[str, Any], reason: str) -> None:
    good = json.dumps({"probe": "sums", "question": "1+1?", "answers": ["2"]}).encode()
    error = failure(workshop, method=with_questions(workshop.add_file(good + b"\n\n" + json.dumps(question).encode())))
    assert (error["code"], error["param"]) == ("invalid_dataset", "method.sdft.retention_file")
    assert error["message"].startswith(f"the retention file: line 3: {reason}")
    assert outcome(workshop, method=with_questions(workshop.add_file(good))).status == "queued"


def test_general_questions_that_are_gone_fail_the_job(workshop: Workshop) -> None:
    error = failure(workshop, method=with_questions("file-gone"))
    assert (error["code"], error["param"]) == ("file_not_found", "method.sdft.retention_file")
    assert error["message"] == "the retention file does not exist any more"


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_a_file_that_is_gone_fails_the_job(workshop: Workshop, param: str) -> None:
    error = failure(workshop, **{f"{param}_id": "file-gone"})
    assert (error["code"], error["param"]) == ("file_not_found", param)


def test_bytes_that_are_gone_fail_the_job(workshop: Workshop) -> None:
    shutil.rmtree(workshop.resources.settings.storage_dir / "files", ignore_errors=True)
    job_id = workshop.add_job("validating_files")
    shutil.rmtree(workshop.resources.settings.storage_dir / "files")
    validate_next(workshop)
    error = get_job(workshop.database, job_id).error
    assert error is not None
    assert error["code"] == "file_not_found"


def test_a_base_model_is_prepared_first(worker_settings: Callable[..., Settings], tiny_model_dir: Path, sqlite_database: Database, tmp_path: Path) -> None:
    settings = worker_settings(cache_dir=tmp_path / "empty_cache", base_models=[{"id": "tiny", "source": str(tiny_model_dir)}])
    prepared = settings.base_models[0].directory(settings.cache_dir)
    prepared.unlink()  # the fixture's short cut
    workshop = workshop_of(settings, sqlite_database, tmp_path)
    assert outcome(workshop).status == "queued"
    assert settings.base_models[0].is_prepared(settings.cache_dir)


def test_an_unusable_base_model_fails_the_job_with_its_reason(make_settings: Callable[..., Settings], sqlite_database: Database, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"\x80")
    settings = make_settings(base_models=[BaseModelEntry(id="tiny", source=str(pickled))])
    error = failure(workshop_of(settings, sqlite_database, tmp_path))
    assert (error["code"], error["param"]) == ("base_model_unusable", "model")
    assert "has no .safetensors weights" in error["message"]


def test_a_base_model_that_left_the_catalogue_fails_the_job(workshop: Workshop) -> None:
    assert failure(workshop, base_model="other")["code"] == "base_model_unusable"


def test_a_bug_fails_the_job_and_names_no_internals(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "_resolve", lambda *arguments: 1 / 0)
    error = failure(workshop)
    assert error["code"] == "server_error"
    assert "division" not in error["message"]


def start_slow_validation(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> tuple[str, threading.Thread]:
    """A validation that takes 20 seconds unless it is stopped."""
    read_lines = validation.read_lines

    def slowly(*arguments: Any) -> Any:
        for line in read_lines(*arguments):
            time.sleep(0.05)
            yield line

    monkeypatch.setattr(validation, "read_lines", slowly)
    job_id = workshop.add_job("validating_files", content=demonstration_file(400))
    thread = threading.Thread(target=validate_next, args=(workshop,))
    thread.start()
    wait_for(lambda: get_job(workshop.database, job_id).lease_token is not None)
    return job_id, thread


def test_a_long_validation_keeps_its_lease(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id, thread = start_slow_validation(workshop, monkeypatch)
    before = get_job(workshop.database, job_id).lease_until
    time.sleep(1.5)
    after = get_job(workshop.database, job_id).lease_until
    workshop.resources.stopping.set()
    thread.join()
    assert before is not None
    assert after is not None
    assert after > before + 0.5


def test_cancelling_stops_a_validation(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id, thread = start_slow_validation(workshop, monkeypatch)
    with workshop.database.transaction() as session:
        request_cancellation(session, job_id)
    thread.join(15)
    assert get_job(workshop.database, job_id).status == "cancelled"
    assert_sound(workshop.database, job_id)


def test_a_deploy_leaves_the_job_to_another_worker(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id, thread = start_slow_validation(workshop, monkeypatch)
    workshop.resources.stopping.set()
    thread.join(15)
    job = get_job(workshop.database, job_id)
    assert (job.status, job.lease_token, job.lost_leases) == ("validating_files", None, 0)
    assert_sound(workshop.database, job_id)


def test_a_lost_lease_ends_a_validation_without_a_word(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id, thread = start_slow_validation(workshop, monkeypatch)
    with workshop.database.transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(lease_token="another"))
    thread.join(15)
    assert not thread.is_alive()
    assert get_job(workshop.database, job_id).lease_token == "another"
    assert messages_of(workshop.database, job_id) == []


def test_problems_are_json(workshop: Workshop) -> None:
    """The error column is what the API renders."""
    assert json.loads(json.dumps(failure(workshop, content=LONG * 1)))["problems"][0]["line"] == 1
