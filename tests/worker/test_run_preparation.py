"""What an attempt begins with: its whole configuration, and the newest checkpoint that is whole."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from core.database import Database
from core.settings import Settings
from core.storage import LocalStorage
from core.tables.jobs import Checkpoint, JobEvent
from sdft_engine.contract.hyperparameters import ResolvedSupervised
from tests.fixtures.scripted_inference import ScriptedInference
from tests.fixtures.scripted_model import state_after
from tests.rows import get_job, messages_of
from tests.worker.conftest import RESOLVED, ROWS, Workshop, workshop_of
from tests.worker.test_supervisor import final_state, train_next

PASSES = {"gradient_checkpointing": True, "tokens_per_pass": 700}
RESOLVED_SUPERVISED = {name: RESOLVED[name] for name in ResolvedSupervised.model_fields}


@pytest.mark.parametrize(
    ("method", "resolved", "expected"),
    [
        (
            {"type": "sdft", "sdft": {"teacher_template": "history", "reasoning": True, "hyperparameters": {}}},
            RESOLVED | {"weight_decay": 0.01, "mask_clipped_completions": "auto"},
            {"teacher_template": "history", "reasoning": True},
        ),
        (
            {"type": "supervised", "supervised": {"hyperparameters": {}}},
            RESOLVED_SUPERVISED | {"max_grad_norm": 0.5},
            {"teacher_template": "example", "reasoning": False},
        ),
    ],
    ids=["sdft", "supervised"],
)
def test_the_trainer_is_told_everything_about_its_job(
    worker_settings: Callable[..., Settings],
    sqlite_database: Database,
    tmp_path: Path,
    method: dict[str, Any],
    resolved: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    settings = worker_settings(
        lease_seconds=10, heartbeat_seconds=0.5, device="cpu", dtype="bfloat16", trainer_threads=3, retention_probes="checkpoints", **PASSES
    )
    workshop = workshop_of(settings, sqlite_database, tmp_path)
    workshop.script(steps=1)
    job_id = workshop.add_job(method=method, resolved_hyperparameters=resolved, seed=1234)
    train_next(workshop)
    assert json.loads((settings.runs_dir / job_id / "attempt-1" / "config.json").read_text()) == expected | {
        "version": 1,
        "sampler": None,
        "importance": "sequence",
        "method": method["type"],
        "base_model": "tiny",
        "base_model_dir": str(settings.base_models[0].directory(settings.cache_dir)),
        "seed": 1234,
        "sdft": resolved if method["type"] == "sdft" else None,
        "supervised": resolved if method["type"] == "supervised" else None,
        "device": "cpu",
        "dtype": "bfloat16",
        "threads": 3,
        "rollout_sample_every_steps": 10,
        "retention": "checkpoints",
        "gradient_checkpointing": True,
        "tokens_per_pass": 700,
    }


def test_rollouts_by_vllm_go_to_the_first_server_that_answers(
    worker_settings: Callable[..., Settings], sqlite_database: Database, inference: ScriptedInference, tmp_path: Path
) -> None:
    """And what a trainer that was killed left on it is gone when the attempt is over."""
    settings = worker_settings(inference_urls=["http://127.0.0.1:9", inference.url], inference_api_key="secret")
    workshop = workshop_of(settings, sqlite_database, tmp_path)
    workshop.script(steps=1)
    job_id = workshop.add_job(method={"type": "sdft", "sdft": {"sampler": "vllm", "hyperparameters": {}}})
    left, of_a_later_attempt = (settings.served_adapters_dir / f"rollout-{job_id}-{attempt}-7" for attempt in (1, 2))
    unfinished = settings.served_adapters_dir / f".rollout-{job_id}-1-8.tmp"
    for directory in (left, of_a_later_attempt, unfinished):
        directory.mkdir(parents=True)
    inference.adapters[left.name] = 5
    train_next(workshop)
    told = json.loads((settings.runs_dir / job_id / "attempt-1" / "config.json").read_text())
    assert told["sampler"] == {
        "url": inference.url,
        "adapters_dir": str(settings.served_adapters_dir),
        "upload": False,
        "name_prefix": f"rollout-{job_id}-1",
        "api_key_env": "SAMPLER_API_KEY",
        "tolerance": settings.attestation_tolerance,
    }
    assert [directory.exists() for directory in (left, unfinished, of_a_later_attempt)] == [False, False, True]
    assert left.name not in inference.adapters


def test_what_a_trainer_on_a_lost_machine_sent_is_gone_when_the_attempt_is_over(
    worker_settings: Callable[..., Settings], sqlite_database: Database, inference: ScriptedInference, tmp_path: Path
) -> None:
    """No directory here names it, only the server."""
    inference.sent.taken = True
    workshop = workshop_of(worker_settings(inference_urls=[inference.url], inference_adapters="upload"), sqlite_database, tmp_path)
    workshop.script(steps=1)
    job_id = workshop.add_job(method={"type": "sdft", "sdft": {"sampler": "vllm", "hyperparameters": {}}})
    names = [f"rollout-{job_id}-1-7", f"rollout-{job_id}-2-7", "rollout-ftjob-0123456789abcdef-1-7"]
    for name in names:
        (inference.sent.directory / name).mkdir()
    inference.adapters |= dict.fromkeys(names, 5)
    train_next(workshop)
    settings = workshop.resources.settings
    told = json.loads((settings.runs_dir / job_id / "attempt-1" / "config.json").read_text())
    assert told["sampler"]["upload"] is True
    (model,) = set(inference.adapters) - set(names)
    assert inference.sent.names() == sorted([*names[1:], model])
    assert set(inference.adapters) == {*names[1:], model}
    assert list(settings.served_adapters_dir.iterdir()) == [], "what was sent is not kept here"


@pytest.mark.parametrize(("probes", "with_file", "without"), [("off", "end", "off"), ("end", "end", "end"), ("checkpoints", "checkpoints", "checkpoints")])
def test_a_file_of_general_questions_is_asked_in_place_of_the_built_in_ones(
    worker_settings: Callable[..., Settings],
    sqlite_database: Database,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    probes: str,
    with_file: str,
    without: str,
) -> None:
    monkeypatch.setattr("worker.supervisor.discard_bulk", lambda run: None)
    settings = worker_settings(lease_seconds=10, heartbeat_seconds=0.5, retention_probes=probes)
    workshop = workshop_of(settings, sqlite_database, tmp_path)
    workshop.script(steps=1)
    questions = b'{"probe": "sums", "question": "1+1?", "answers": ["2"]}\n\n{"probe": "sums", "question": "1+2?", "answers": ["3"]}\n'
    for file_id, expected in ((workshop.add_file(questions), with_file), (None, without)):
        job_id = workshop.add_job(method={"type": "sdft", "sdft": {"hyperparameters": {}, "retention_file": file_id}})
        train_next(workshop)
        run_dir = settings.runs_dir / job_id / "attempt-1"
        assert json.loads((run_dir / "config.json").read_text())["retention"] == expected
        assert (run_dir / "retention.jsonl").exists() == (file_id is not None)
        if file_id:
            assert (run_dir / "retention.jsonl").read_bytes() == questions


def test_where_every_checkpoint_is_damaged_training_starts_from_the_beginning_and_says_so(workshop: Workshop, inference: ScriptedInference) -> None:
    workshop.script(at={"1": {"11": "kill"}})
    job_id = workshop.add_job()
    train_next(workshop)
    storage = workshop.resources.storage
    assert isinstance(storage, LocalStorage)
    with workshop.database.reading() as session:
        keys = session.scalars(select(Checkpoint.storage_key).where(Checkpoint.job_id == job_id)).all()
    assert len(keys) == 2
    for key in keys:
        storage.path_of(key).write_bytes(b"something else")
    train_next(workshop)
    with workshop.database.reading() as session:
        warnings = session.scalars(select(JobEvent.message).where(JobEvent.job_id == job_id, JobEvent.level == "warn").order_by(JobEvent.sequence)).all()
    assert warnings[1:] == [  # the first one tells of the kill
        "The checkpoint of step 8 is damaged or gone; the one of step 4 is tried",
        "The checkpoint of step 4 is damaged or gone; there is none before it, so training starts from the beginning",
    ]
    assert [message for message in messages_of(workshop.database, job_id) if message.startswith("resumed")] == []
    assert get_job(workshop.database, job_id).status == "succeeded"
    assert final_state(workshop, job_id, inference) == state_after(12, ROWS)
