from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import update

from api.fine_tuning.jobs.service import evenly_spread
from core.database import Database, unix_now
from core.ids import new_id
from core.jobs.events import append_event, upsert_metrics
from core.jobs.transitions import Progress, claim_for_training, claim_for_validation, finish_pause, finish_validation, record_progress
from core.tables.jobs import Checkpoint, Job
from core.workers import tell_presence
from tests.api.model_rows import add_model
from tests.api.serving import Api
from tests.api.test_errors import assert_error
from tests.rows import assert_sound, messages_of, succeed_job

JOBS = "/v1/fine_tuning/jobs"
RESOLVED: dict[str, Any] = {"n_epochs": 9, "batch_size": 8, "learning_rate": 1e-3}


def get(api: Api, job_id: str) -> dict[str, Any]:
    answer = api.client.get(f"{JOBS}/{job_id}")
    assert answer.status_code == 200, answer.text
    job: dict[str, Any] = answer.json()
    return job


def validate_next(database: Database) -> None:
    with database.transaction() as session:
        claim = claim_for_validation(session, 60)
        assert claim is not None
        finish_validation(session, claim, RESOLVED, 108)


def change(api: Api, job_id: str, **columns: Any) -> None:
    with api.database.transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(**columns))


def ids_of(api: Api, **parameters: Any) -> list[str]:
    answer = api.client.get(JOBS, params=parameters)
    assert answer.status_code == 200, answer.text
    return [job["id"] for job in answer.json()["data"]]


def test_unknown_job(api: Api) -> None:
    for method, path in (
        ("GET", ""),
        ("POST", "/cancel"),
        ("POST", "/pause"),
        ("POST", "/resume"),
        ("GET", "/events"),
        ("GET", "/checkpoints"),
        ("GET", "/metrics"),
    ):
        assert_error(api.client.request(method, f"{JOBS}/ftjob-unknown{path}"), 404, "fine_tune_not_found", "fine_tuning_job_id")


def test_job_on_its_way(api_on_both: Api) -> None:
    api, database = api_on_both, api_on_both.database
    job_id = api.create_job()["id"]
    validate_next(database)
    job = get(api, job_id)
    assert (job["status"], job["queue_position"]) == ("queued", 1)
    assert job["hyperparameters"]["n_epochs"] == 9
    assert job["hyperparameters"]["learning_rate_multiplier"] == "auto"
    assert job["method"]["sdft"]["hyperparameters"] == job["hyperparameters"]
    assert job["progress"] == {"step": None, "total_steps": 108, "phase": None}
    with database.transaction() as session:
        claim = claim_for_training(session, 60)
        assert claim is not None
        record_progress(session, claim, Progress(step=12, phase="training", trained_tokens=345, estimated_finish_at=1_999_999_999.9))
    job = get(api, job_id)
    assert (job["status"], job["attempt"], job["queue_position"]) == ("running", 1, None)
    assert job["progress"] == {"step": 12, "total_steps": 108, "phase": "training"}
    assert (job["trained_tokens"], job["estimated_finish"]) == (345, 1_999_999_999)
    with database.transaction() as session:
        succeed_job(session, claim)
    job = get(api, job_id)
    assert (job["status"], job["fine_tuned_model"], job["result_files"]) == ("succeeded", "ft:tiny:default::1", ["file-1"])
    assert job["finished_at"] >= job["created_at"]
    assert job["estimated_finish"] is None


def test_failed_job_says_why(api: Api) -> None:
    job_id = api.create_job()["id"]
    change(api, job_id, status="failed", error={"code": "out_of_memory", "message": "too much", "param": None}, finished_at=unix_now())
    assert get(api, job_id)["error"] == {"code": "out_of_memory", "message": "too much", "param": None}


def test_queue_positions_follow_the_claims(api_on_both: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Projects take turns, so the other one's only job comes second."""
    monkeypatch.setattr("api.fine_tuning.jobs.queue_view.FRESH_SECONDS", 0)
    api = api_on_both
    file_id = api.upload()
    ids = [api.create_job(training_file=file_id)["id"] for _ in range(3)]
    others = api.client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("t.jsonl", b"".join([_LINE] * 12))}, headers=api.other_headers)
    foreign = api.client.post(JOBS, json={"model": "tiny", "training_file": others.json()["id"]}, headers=api.other_headers).json()["id"]
    ids.append(api.create_job(training_file=file_id)["id"])
    for _ in range(5):
        validate_next(api.database)
    assert [get(api, job_id)["queue_position"] for job_id in ids] == [1, 3, 4, 5]
    assert api.client.get(f"{JOBS}/{foreign}", headers=api.other_headers).json()["queue_position"] == 2
    listed = {job["id"]: job["queue_position"] for job in api.client.get(JOBS).json()["data"]}
    assert listed == dict(zip(ids, [1, 3, 4, 5], strict=True))
    with api.database.transaction() as session:
        claim = claim_for_training(session, 60)
    assert claim is not None
    assert claim.job_id == ids[0]
    assert [get(api, job_id)["queue_position"] for job_id in ids] == [None, 2, 3, 4]


def test_a_queued_job_says_when_it_will_start_as_far_as_anybody_can_tell(api_on_both: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.fine_tuning.jobs.queue_view.FRESH_SECONDS", 0)
    api, now = api_on_both, unix_now()
    file_id = api.upload()
    running, first, second, done = (api.create_job(training_file=file_id)["id"] for _ in range(4))
    for _ in range(4):
        validate_next(api.database)
    assert get(api, first)["estimated_start"] is None, "no worker is there"
    with api.database.transaction() as session:
        tell_presence(session, "worker-1", "host", [[], []])
    assert get(api, running)["estimated_start"] == pytest.approx(now, abs=20)
    with api.database.transaction() as session:
        claim = claim_for_training(session, 60)
        assert claim is not None
        record_progress(session, claim, Progress(estimated_finish_at=now + 500))
    change(api, done, status="succeeded", started_at=now - 1000, finished_at=now - 400)
    assert get(api, first)["estimated_start"] == pytest.approx(now, abs=20)
    assert get(api, second)["estimated_start"] == pytest.approx(now + 500, abs=20)
    assert get(api, running)["estimated_start"] is None
    with api.database.transaction() as session:
        tell_presence(session, "worker-1", "host", [[]])
    starts = [get(api, job_id)["estimated_start"] for job_id in (first, second)]
    assert starts == [pytest.approx(now + 500, abs=20), pytest.approx(now + 500 + 600, abs=20)]


def test_a_cancel_whose_answer_got_lost_can_be_sent_again(api_on_both: Api) -> None:
    api, retry = api_on_both, {"x-stainless-retry-count": "1"}
    cancelled, failed = api.create_job()["id"], api.create_job()["id"]
    change(api, failed, status="failed", error={"code": "x", "message": "x", "param": None}, finished_at=unix_now())
    assert api.client.post(f"{JOBS}/{cancelled}/cancel").json()["status"] == "cancelled"
    again = api.client.post(f"{JOBS}/{cancelled}/cancel", headers=retry)
    assert (again.status_code, again.json()["status"]) == (200, "cancelled")
    assert_error(api.client.post(f"{JOBS}/{cancelled}/cancel"), 400, "job_already_finished", "fine_tuning_job_id")
    for path in (f"{JOBS}/{failed}/cancel", f"{JOBS}/{cancelled}/pause"):
        assert_error(api.client.post(path, headers=retry), 400, "job_already_finished", "fine_tuning_job_id")
    entries = api.client.get("/v1/organization/audit_logs", headers=api.admin_headers).json()["data"]
    assert [entry["type"] for entry in entries].count("fine_tuning.job.cancelled") == 1


def test_pause_and_resume(api_on_both: Api) -> None:
    api, database = api_on_both, api_on_both.database
    job_id = api.create_job()["id"]
    validate_next(database)

    def post(action: str) -> dict[str, Any]:
        answer = api.client.post(f"{JOBS}/{job_id}/{action}", headers={"content-type": "application/json"})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    assert (post("pause")["status"], post("pause")["queue_position"]) == ("paused", None)
    assert [post("resume")["status"], post("resume")["status"]] == ["queued", "queued"]
    with database.transaction() as session:
        claim = claim_for_training(session, 60)
        assert claim is not None
    assert post("pause")["status"] == "running"
    with database.transaction() as session:
        finish_pause(session, claim)
    assert get(api, job_id)["status"] == "paused"
    assert_error(api.client.post(f"{JOBS}/{job_id}/pause", headers=api.other_headers), 404, "fine_tune_not_found", "fine_tuning_job_id")
    assert api.client.post(f"{JOBS}/{job_id}/cancel").json()["status"] == "cancelled"
    for action in ("pause", "resume"):
        message = assert_error(api.client.post(f"{JOBS}/{job_id}/{action}"), 400, "job_already_finished", "fine_tuning_job_id")
        assert f"can't be {action}d" in message
    assert_sound(database, job_id)


_LINE = b'{"prompt": "a", "completion": "b"}\n'


def test_list_is_paged(api_on_both: Api) -> None:
    api = api_on_both
    file_id = api.upload()
    ids = [api.create_job(training_file=file_id)["id"] for _ in range(5)][::-1]
    assert ids_of(api) == ids
    page = api.client.get(JOBS, params={"limit": 2}).json()
    assert {name: page[name] for name in ("object", "first_id", "last_id", "has_more")} == {
        "object": "list",
        "first_id": ids[0],
        "last_id": ids[1],
        "has_more": True,
    }
    assert ids_of(api, limit=2, after=ids[1]) == ids[2:4]
    assert ids_of(api, limit=2, after=ids[3]) == ids[4:]
    assert api.client.get(JOBS, params={"limit": 5}).json()["has_more"] is False
    assert_error(api.client.get(JOBS, params={"after": "ftjob-unknown"}), 400, "invalid_cursor", "after")
    for limit in (0, -1, 1001):
        assert api.client.get(JOBS, params={"limit": limit}).status_code == 400


def test_list_by_metadata(api_on_both: Api) -> None:
    api = api_on_both
    file_id = api.upload()
    strange = """a.b["c"]'; $."""
    first = api.create_job(training_file=file_id, metadata={"team": "support", strange: "x%_"})["id"]
    second = api.create_job(training_file=file_id, metadata={"team": "support", "other": "1"})["id"]
    api.create_job(training_file=file_id)
    assert ids_of(api, **{"metadata[team]": "support"}) == [second, first]
    assert ids_of(api, **{"metadata[team]": "support", "metadata[other]": "1"}) == [second]
    assert ids_of(api, **{f"metadata[{strange}]": "x%_"}) == [first]
    assert ids_of(api, **{f"metadata[{strange}]": "xyz"}) == []
    assert ids_of(api, **{"metadata[team]": "sup"}) == []
    assert ids_of(api, **{"metadata[absent]": ""}) == []
    assert ids_of(api, **{"metadata[team]": "support", "limit": 1, "after": second}) == [first]
    too_many = {f"metadata[{number}]": "x" for number in range(17)}
    assert_error(api.client.get(JOBS, params=too_many), 400, "too_long", "metadata")


def test_stock_client_lists_by_metadata(live_api: Api) -> None:
    job = live_api.create_job(metadata={"team": "support"})
    live_api.create_job()
    assert [found.id for found in live_api.openai.fine_tuning.jobs.list(metadata={"team": "support"})] == [job["id"]]


def test_waiting_job_is_cancelled_at_once(api_on_both: Api) -> None:
    api = api_on_both
    job_id = api.create_job()["id"]
    answer = api.client.post(f"{JOBS}/{job_id}/cancel", headers={"content-type": "application/json"})
    assert answer.status_code == 200
    assert answer.json()["status"] == "cancelled"
    assert answer.json()["finished_at"] is not None
    assert_sound(api.database, job_id)


def test_running_job_is_asked_to_stop(api_on_both: Api) -> None:
    api = api_on_both
    job_id = api.create_job()["id"]
    with api.database.transaction() as session:
        assert claim_for_validation(session, 60)
    for _ in range(2):
        answer = api.client.post(f"{JOBS}/{job_id}/cancel")
        assert (answer.status_code, answer.json()["status"]) == (200, "validating_files")
    assert "Cancellation requested; the job stops at its next step" in messages_of(api.database, job_id)


@pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled"])
def test_finished_job_cannot_be_cancelled(api: Api, status: str) -> None:
    job_id = api.create_job()["id"]
    change(api, job_id, status=status, finished_at=unix_now())
    message = assert_error(api.client.post(f"{JOBS}/{job_id}/cancel"), 400, "job_already_finished", "fine_tuning_job_id")
    assert status in message
    assert get(api, job_id)["status"] == status


def test_events_are_paged_newest_first(api_on_both: Api) -> None:
    api = api_on_both
    job_id, other_id = api.create_job()["id"], api.create_job()["id"]
    for number in range(4):
        with api.database.transaction() as session:
            append_event(session, job_id, f"event {number}", level="warn", data={"number": number})
            append_event(session, other_id, "another job's")
    path = f"{JOBS}/{job_id}/events"
    page = api.client.get(path, params={"limit": 2}).json()
    assert [event["message"] for event in page["data"]] == ["event 3", "event 2"]
    assert page["has_more"] is True
    assert page["last_id"] == page["data"][1]["id"]
    first = page["data"][0]
    assert first["id"].startswith("ftevent-")
    assert (first["object"], first["level"], first["type"], first["data"]) == ("fine_tuning.job.event", "warn", "message", {"number": 3})
    rest = api.client.get(path, params={"after": page["last_id"]}).json()
    assert [event["message"] for event in rest["data"]] == ["event 1", "event 0", f"Created fine-tuning job: {job_id}"]
    assert rest["has_more"] is False
    foreign = api.client.get(f"{JOBS}/{other_id}/events").json()["first_id"]
    for after in ("ftevent-unknown", foreign):
        assert_error(api.client.get(path, params={"after": after}), 400, "invalid_cursor", "after")


def add_checkpoint(api: Api, job_id: str, step: int) -> str:
    checkpoint_id = new_id("ftckpt")
    metrics = {"train_loss": 1 / step}
    with api.database.transaction() as session:
        session.add(
            Checkpoint(
                id=checkpoint_id,
                job_id=job_id,
                step=step,
                created_at=unix_now(),
                storage_key=f"checkpoints/{step}",
                sha256="0",
                metrics=metrics,
                model_id=f"ft:tiny:default::1:ckpt-step-{step}",
            )
        )
    return checkpoint_id


def test_checkpoints_are_paged_newest_first(api_on_both: Api) -> None:
    api = api_on_both
    job_id = api.create_job()["id"]
    ids = {step: add_checkpoint(api, job_id, step) for step in (10, 20, 30)}
    path = f"{JOBS}/{job_id}/checkpoints"
    page = api.client.get(path, params={"limit": 2}).json()
    assert [checkpoint["step_number"] for checkpoint in page["data"]] == [30, 20]
    assert (page["first_id"], page["last_id"], page["has_more"]) == (ids[30], ids[20], True)
    checkpoint = page["data"][0]
    assert checkpoint["object"] == "fine_tuning.job.checkpoint"
    assert checkpoint["fine_tuning_job_id"] == job_id
    assert checkpoint["fine_tuned_model_checkpoint"] == "ft:tiny:default::1:ckpt-step-30"
    assert checkpoint["metrics"] == {"step": 30, "train_loss": 1 / 30}
    assert [item["id"] for item in api.client.get(path, params={"after": ids[20]}).json()["data"]] == [ids[10]]
    assert_error(api.client.get(path, params={"after": "ftckpt-unknown"}), 400, "invalid_cursor", "after")


def test_checkpoints_whose_models_were_deleted_are_not_listed(api_on_both: Api) -> None:
    """But they still are cursors, and those whose training state alone is gone are listed."""
    api = api_on_both
    job_id = api.create_job()["id"]
    ids = {step: add_checkpoint(api, job_id, step) for step in (10, 20, 30, 40)}
    kept, deleted = (add_model(api, f"ft:tiny:default::1:ckpt-step-{step}", step=step) for step in (10, 30))
    assert api.client.delete(f"/v1/models/{deleted.id}").status_code == 200
    with api.database.transaction() as session:
        session.execute(update(Checkpoint).where(Checkpoint.id == ids[10]).values(storage_key=None))
    path = f"{JOBS}/{job_id}/checkpoints"
    assert [checkpoint["step_number"] for checkpoint in api.client.get(path).json()["data"]] == [40, 20, 10]
    assert api.client.get(path, params={"after": ids[30]}).json()["data"][-1]["fine_tuned_model_checkpoint"] == kept.id


def test_stock_client_lists_checkpoints(live_api: Api) -> None:
    job_id = live_api.create_job()["id"]
    ids = [add_checkpoint(live_api, job_id, step) for step in (1, 2, 3)]
    found = list(live_api.openai.fine_tuning.jobs.checkpoints.list(job_id, limit=1))
    assert [checkpoint.id for checkpoint in found] == ids[::-1]
    assert found[0].metrics.train_loss == 1 / 3


def test_metrics_are_ascending_and_thinned(api_on_both: Api) -> None:
    api = api_on_both
    job_id = api.create_job()["id"]
    with api.database.transaction() as session:
        for step in range(1, 101):
            upsert_metrics(session, job_id, 1, {step: {"step": step, "train_loss": 1 / step}})
    path = f"{JOBS}/{job_id}/metrics"
    whole = api.client.get(path).json()
    assert whole["object"] == "list"
    assert [point["step"] for point in whole["data"]] == list(range(1, 101))
    assert whole["data"][9]["train_loss"] == 0.1
    assert isinstance(whole["data"][9]["created_at"], int)
    assert [point["step"] for point in api.client.get(path, params={"since_step": 97}).json()["data"]] == [98, 99, 100]
    assert api.client.get(path, params={"since_step": 100}).json()["data"] == []
    assert [point["step"] for point in api.client.get(path, params={"max_points": 4}).json()["data"]] == [25, 50, 75, 100]
    assert [point["step"] for point in api.client.get(path, params={"max_points": 1}).json()["data"]] == [100]
    for wrong in ({"since_step": -1}, {"since_step": 10**30}, {"since_step": 2**31}, {"max_points": 0}, {"max_points": 10_001}):
        assert api.client.get(path, params=wrong).status_code == 400


@given(count=st.integers(0, 3000), most=st.integers(1, 3000))
def test_points_are_spread_evenly(count: int, most: int) -> None:
    chosen = evenly_spread(count, most)
    assert len(chosen) == min(count, most)
    assert chosen == sorted(set(chosen))
    if count:
        assert chosen[0] >= 0
        assert chosen[-1] == count - 1
        gaps = {after - before for before, after in zip([-1, *chosen], chosen, strict=False)}
        assert max(gaps) - min(gaps) <= 1


def test_base_models(api: Api) -> None:
    entry = api.settings.base_models[0]
    page = api.client.get("/v1/fine_tuning/base_models").json()
    expected = {"id": "tiny", "object": "fine_tuning.base_model", "prepared": False, "methods": ["sdft", "supervised"]}
    assert page == {"object": "list", "data": [expected], "first_id": "tiny", "last_id": "tiny", "has_more": False}
    directory = entry.directory(api.settings.cache_dir)
    directory.mkdir(parents=True)
    (directory / "prepared.json").write_text("{}")
    assert api.client.get("/v1/fine_tuning/base_models").json()["data"][0]["prepared"] is True
    assert "/models/tiny" not in api.client.get("/v1/fine_tuning/base_models").text
