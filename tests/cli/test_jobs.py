import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from cli.errors import CliError
from cli.jobs import parse_pair, training_fields
from sdft_engine.contract.teacher_prompts import NAMED_TEMPLATES
from tests.cli.stub_server import Answer, StubServer, json_answer, refusal

JOB = {
    "id": "ftjob-1",
    "object": "fine_tuning.job",
    "created_at": 1_700_000_000,
    "model": "base",
    "status": "running",
    "fine_tuned_model": None,
    "progress": {"step": 3, "total_steps": 10, "phase": "training"},
    "queue_position": None,
}


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ("n_epochs=3", ("n_epochs", 3)),
        ("learning_rate=1e-4", ("learning_rate", 1e-4)),
        ("batch_size=auto", ("batch_size", "auto")),
        ("mask_clipped_completions=false", ("mask_clipped_completions", False)),
        ("entry_clip=null", ("entry_clip", None)),
        ("x=a=b", ("x", "a=b")),
    ],
)
def test_values_are_json_where_they_can_be(pair: str, expected: tuple[str, object]) -> None:
    assert parse_pair(pair) == expected


@pytest.mark.parametrize("pair", ["n_epochs", "=3", ""])
def test_a_pair_needs_a_key_and_a_value(pair: str) -> None:
    with pytest.raises(CliError, match="key=value"):
        parse_pair(pair)


@pytest.mark.parametrize(("pair", "option"), [("sampler=vllm", "--sampler vllm"), ("teacher_template=history", "--teacher-template history")])
def test_what_is_no_hyperparameter_names_its_option(pair: str, option: str) -> None:
    with pytest.raises(CliError, match=f"no hyperparameter; write {option}"):
        parse_pair(pair)


def test_hyperparameters_alone_are_for_the_servers_method() -> None:
    assert training_fields(None, {}, {"sampler": None}) == {}
    assert training_fields(None, {"n_epochs": 2}, {}) == {"hyperparameters": {"n_epochs": 2}}
    assert training_fields("supervised", {}, {}) == {"method": {"type": "supervised", "supervised": {}}}
    assert training_fields("supervised", {"n_epochs": 2}, {}) == {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}}


def test_what_only_sdft_has_makes_it_sdft() -> None:
    assert training_fields(None, {}, {"sampler": "vllm", "teacher_template": None}) == {"method": {"type": "sdft", "sdft": {"sampler": "vllm"}}}
    assert training_fields(None, {}, {"teacher_template": "history"}) == {"method": {"type": "sdft", "sdft": {"teacher_template": "history"}}}
    section = {"hyperparameters": {"temperature": 0.5}, "teacher_template": "history_twice"}
    assert training_fields(None, {"temperature": 0.5}, {"teacher_template": "history_twice"}) == {"method": {"type": "sdft", "sdft": section}}


def test_create_uploads_a_path_first(sdft: Callable[..., Result], stub: StubServer, tmp_path: Path) -> None:
    stub.routes["POST /files"] = lambda _: json_answer({"id": "file-7"})
    stub.routes["POST /fine_tuning/jobs"] = lambda _: json_answer(JOB)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    words = (
        "--method",
        "sdft",
        "--suffix",
        "support",
        "--seed",
        "5",
        "--hp",
        "n_epochs=2",
        "--hp",
        "temperature=0.5",
        "--teacher-template",
        "history",
        "--sampler",
        "vllm",
    )
    result = sdft("jobs", "create", "base", "rows.jsonl", *words)
    assert (result.exit_code, result.stdout) == (0, "ftjob-1\n")
    assert [request.path for request in stub.received] == ["/files", "/fine_tuning/jobs"]
    assert stub.received[-1].json == {
        "model": "base",
        "training_file": "file-7",
        "method": {"type": "sdft", "sdft": {"hyperparameters": {"n_epochs": 2, "temperature": 0.5}, "teacher_template": "history", "sampler": "vllm"}},
        "suffix": "support",
        "seed": 5,
    }


def refuse_jobs(stub: StubServer, answer: Answer) -> None:
    uploads = iter(["file-7", "file-8"])
    stub.routes["POST /files"] = lambda _: json_answer({"id": next(uploads)})
    stub.routes["DELETE /files/file-[78]"] = lambda _: json_answer({"deleted": True})
    stub.routes["POST /fine_tuning/jobs"] = lambda _: answer


def deleted_files(stub: StubServer) -> list[str]:
    return [request.path for request in stub.received if request.method == "DELETE"]


def test_a_refused_job_leaves_none_of_its_uploads(sdft: Callable[..., Result], stub: StubServer, tmp_path: Path) -> None:
    refuse_jobs(stub, refusal(400, "no such hyperparameter: x"))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    result = sdft("jobs", "create", "base", "rows.jsonl", "--validation-file", "rows.jsonl")
    assert (result.exit_code, result.stdout) == (1, "")
    assert deleted_files(stub) == ["/files/file-7", "/files/file-8"]
    assert result.stderr.splitlines()[2:] == ["deleted file-7 again", "deleted file-8 again", "error: no such hyperparameter: x"]


def test_a_refused_job_keeps_files_that_were_there_before(sdft: Callable[..., Result], stub: StubServer, tmp_path: Path) -> None:
    refuse_jobs(stub, refusal(404, "no such model", "model_not_found"))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert sdft("jobs", "create", "x", "file-1", "--validation-file", "rows.jsonl").exit_code == 1
    assert deleted_files(stub) == ["/files/file-7"]


def test_an_upload_stays_where_the_job_may_exist(sdft: Callable[..., Result], stub: StubServer, tmp_path: Path) -> None:
    refuse_jobs(stub, refusal(504, "the gateway gave up"))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert sdft("jobs", "create", "base", "rows.jsonl").exit_code == 1
    assert deleted_files(stub) == []


def test_an_upload_that_cannot_be_deleted_is_named_and_the_refusal_stays_the_error(sdft: Callable[..., Result], stub: StubServer, tmp_path: Path) -> None:
    refuse_jobs(stub, refusal(400, "no such hyperparameter: x"))
    stub.routes["DELETE /files/file-[78]"] = lambda _: refusal(503, "busy")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    lines = sdft("jobs", "create", "base", "rows.jsonl").stderr.splitlines()
    assert lines[1:] == ["file-7 is still on the server: busy", "error: no such hyperparameter: x"]


def test_both_files_are_looked_at_before_one_is_uploaded(sdft: Callable[..., Result], stub: StubServer, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    result = sdft("jobs", "create", "base", "rows.jsonl", "--validation-file", "other.jsonl")
    assert (result.exit_code, stub.received) == (1, [])
    assert "other.jsonl is neither a file on this machine" in result.stderr


def test_help_names_every_teacher_template(sdft: Callable[..., Result]) -> None:
    words = sdft("jobs", "create", "--help").stdout.split()
    assert set(NAMED_TEMPLATES) <= {word.strip(",.") for word in words}


def test_create_with_an_uploaded_file_sends_only_what_was_given(sdft: Callable[..., Result], stub: StubServer) -> None:
    stub.routes["POST /fine_tuning/jobs"] = lambda _: json_answer(JOB)
    assert json.loads(sdft("jobs", "create", "base", "file-7", "--validation-file", "file-8", "--json").stdout) == JOB
    assert stub.received[-1].json == {"model": "base", "training_file": "file-7", "validation_file": "file-8"}


def test_create_with_neither_a_file_nor_an_id_asks_nobody(sdft: Callable[..., Result], stub: StubServer) -> None:
    result = sdft("jobs", "create", "base", "rows.jsonl")
    assert (result.exit_code, stub.received) == (1, [])
    assert "rows.jsonl is neither a file on this machine" in result.stderr


def test_a_wrong_pair_uploads_nothing(sdft: Callable[..., Result], stub: StubServer, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert sdft("jobs", "create", "base", "rows.jsonl", "--hp", "n_epochs").exit_code == 1
    assert stub.received == []


def test_list_shows_place_in_the_queue_and_step(sdft: Callable[..., Result], stub: StubServer) -> None:
    queued = JOB | {"id": "ftjob-2", "status": "queued", "queue_position": 4, "progress": None}
    never_ran = JOB | {"id": "ftjob-3", "status": "cancelled", "progress": {"step": None, "total_steps": 2, "phase": None}}
    stub.routes["GET /fine_tuning/jobs"] = lambda _: json_answer({"data": [JOB, queued, never_ran], "has_more": False})
    out = sdft("jobs", "list").stdout
    assert "step 3/10" in out
    assert "place 4 in the queue" in out
    assert out.splitlines()[-1].split()[1:3] == ["cancelled", "-"]


def test_get_as_json_and_as_fields(sdft: Callable[..., Result], stub: StubServer) -> None:
    stub.routes["GET /fine_tuning/jobs/ftjob-1"] = lambda _: json_answer(JOB)
    assert json.loads(sdft("jobs", "get", "ftjob-1", "--json").stdout) == JOB
    shown = sdft("jobs", "get", "ftjob-1").stdout
    assert "status: running" in shown
    assert '"total_steps": 10' in shown
    assert "fine_tuned_model" not in shown


def test_pause_says_whether_it_is_done_and_resume_where_the_job_is(sdft: Callable[..., Result], stub: StubServer) -> None:
    stub.routes["POST /fine_tuning/jobs/ftjob-1/pause"] = lambda _: json_answer(JOB)
    stub.routes["POST /fine_tuning/jobs/ftjob-2/pause"] = lambda _: json_answer(JOB | {"status": "paused"})
    stub.routes["POST /fine_tuning/jobs/ftjob-2/resume"] = lambda _: json_answer(JOB | {"status": "queued"})
    assert "stops at its next step" in sdft("jobs", "pause", "ftjob-1").stdout
    assert sdft("jobs", "pause", "ftjob-2").stdout == "paused\n"
    assert sdft("jobs", "resume", "ftjob-2").stdout == "the job is queued\n"


def test_cancel_says_whether_it_is_done(sdft: Callable[..., Result], stub: StubServer) -> None:
    stub.routes["POST /fine_tuning/jobs/ftjob-1/cancel"] = lambda _: json_answer(JOB)
    stub.routes["POST /fine_tuning/jobs/ftjob-2/cancel"] = lambda _: json_answer(JOB | {"status": "cancelled"})
    assert "stops at its next step" in sdft("jobs", "cancel", "ftjob-1").stdout
    assert stub.received[-1].body == b""
    assert sdft("jobs", "cancel", "ftjob-2").stdout == "cancelled\n"


def test_events_are_shown_oldest_first(sdft: Callable[..., Result], stub: StubServer) -> None:
    events = [{"id": f"ftevent-{n}", "created_at": 1_700_000_000 + n, "level": "info", "message": f"event {n}", "type": "message"} for n in (3, 2, 1)]
    stub.routes["GET /fine_tuning/jobs/ftjob-1/events"] = lambda _: json_answer({"data": events, "has_more": False})
    assert [line[-7:] for line in sdft("jobs", "events", "ftjob-1").stdout.splitlines()] == ["event 1", "event 2", "event 3"]
    assert json.loads(sdft("jobs", "events", "ftjob-1", "--json").stdout) == events


def test_an_error_of_the_server_is_one_line(sdft: Callable[..., Result], stub: StubServer) -> None:
    stub.routes["GET /fine_tuning/jobs/ftjob-9"] = lambda _: refusal(404, "No such job: ftjob-9")
    result = sdft("jobs", "get", "ftjob-9")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "error: No such job: ftjob-9\n")


def test_a_wrong_key_is_one_line(sdft: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    result = sdft("jobs", "list")
    assert (result.exit_code, result.stderr) == (1, "error: Incorrect API key provided\n")
