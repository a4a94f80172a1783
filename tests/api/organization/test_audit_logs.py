from typing import Any

import pytest
from sqlalchemy import text, update
from sqlalchemy.exc import DBAPIError

from api.files.service import delete_expired_files
from core.tables.files import File
from tests.api.model_rows import add_model
from tests.api.serving import Api
from tests.api.test_errors import assert_error

LOGS = "/v1/organization/audit_logs"
PROJECTS = "/v1/organization/projects"


def logs(api: Api, **params: Any) -> list[dict[str, Any]]:
    answer = api.client.get(LOGS, params=params, headers=api.admin_headers)
    assert answer.status_code == 200, answer.text
    data: list[dict[str, Any]] = answer.json()["data"]
    return data


def admin(api: Api, method: str, path: str, **options: Any) -> Any:
    answer = api.client.request(method, path, headers=api.admin_headers, **options)
    assert answer.status_code == 200, answer.text
    return answer


def test_every_change_is_written_with_who_and_where(api_on_both: Api) -> None:
    api = api_on_both
    before = len(logs(api, limit=100))
    answers: list[Any] = [admin(api, "POST", PROJECTS, json={"name": "team-a", "max_running_jobs": 1})]
    project = answers[0].json()["id"]
    answers.append(admin(api, "POST", f"{PROJECTS}/{project}", json={"max_running_jobs": 3}))
    answers.append(admin(api, "POST", f"{PROJECTS}/{project}/api_keys", json={"name": "laptop", "scopes": ["read"]}))
    key = answers[-1].json()["id"]
    answers.append(admin(api, "DELETE", f"{PROJECTS}/{project}/api_keys/{key}"))
    answers.append(admin(api, "POST", f"{PROJECTS}/{project}/archive"))
    model = add_model(api, "ft:tiny:default:x:1").id
    job = api.client.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": api.upload()})
    answers.append(job)
    answers.append(api.client.post(f"/v1/fine_tuning/jobs/{job.json()['id']}/cancel"))
    answers.append(api.client.delete(f"/v1/files/{job.json()['training_file']}"))
    answers.append(api.client.delete(f"/v1/models/{model}"))
    assert [answer.status_code for answer in answers] == [200] * 9

    written = logs(api, limit=9)[::-1]
    assert len(logs(api, limit=100)) == before + 9
    assert [(entry["type"], entry[entry["type"]]) for entry in written] == [
        ("project.created", {"id": project, "data": {"name": "team-a"}}),
        ("project.updated", {"id": project, "changes_requested": {"max_running_jobs": 3}}),
        ("api_key.created", {"id": key, "data": {"name": "laptop", "scopes": ["read"]}}),
        ("api_key.deleted", {"id": key}),
        ("project.archived", {"id": project}),
        ("fine_tuning.job.created", {"id": job.json()["id"]}),
        ("fine_tuning.job.cancelled", {"id": job.json()["id"]}),
        ("file.deleted", {"id": job.json()["training_file"]}),
        ("model.deleted", {"id": model}),
    ]
    assert [entry["request_id"] for entry in written] == [answer.headers["x-request-id"] for answer in answers]
    keys = [api.admin_key.split("_")[1]] * 5 + [api.key.split("_")[1]] * 4
    assert [entry["actor"] for entry in written] == [{"type": "api_key", "api_key": {"id": key_id}} for key_id in keys]
    assert [entry["project"]["name"] for entry in written] == ["team-a"] * 5 + ["default"] * 4
    assert all(entry["id"].startswith("audit_log-") and entry["object"] == "organization.audit_log" for entry in written)


def test_where_events_are_sent_is_written_without_what_may_be_secret(api: Api) -> None:
    path, failed = "/v1/webhook_endpoints", ["fine_tuning.job.failed"]
    created = api.client.post(path, json={"name": "hook", "url": "https://hooks.example.com/a/secret-path?token=secret-token", "event_types": failed})
    endpoint = created.json()["id"]
    answers = [
        created,
        api.client.post(f"{path}/{endpoint}", json={"url": "https://elsewhere.example.com:8443/secret-path", "enabled": False}),
        api.client.post(f"{path}/{endpoint}/rotate_secret"),
        api.client.delete(f"{path}/{endpoint}"),
    ]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert api.client.post(f"{path}/{endpoint}", json={}).status_code == 404
    written = logs(api, limit=4)[::-1]
    assert [(entry["type"], entry[entry["type"]]) for entry in written] == [
        ("webhook_endpoint.created", {"id": endpoint, "data": {"name": "hook", "url": "https://hooks.example.com:443", "event_types": failed}}),
        ("webhook_endpoint.updated", {"id": endpoint, "changes_requested": {"url": "https://elsewhere.example.com:8443", "enabled": False}}),
        ("webhook_endpoint.secret_rotated", {"id": endpoint}),
        ("webhook_endpoint.deleted", {"id": endpoint}),
    ]
    assert [entry["request_id"] for entry in written] == [answer.headers["x-request-id"] for answer in answers]
    assert not any(word in str(written) for word in ("secret-", "whsec"))


def test_what_does_not_happen_is_not_written(api: Api) -> None:
    job = api.create_job()
    before = logs(api)
    for method, path in (("DELETE", f"/v1/files/{job['training_file']}"), ("DELETE", "/v1/files/file-unknown"), ("DELETE", "/v1/models/tiny")):
        assert api.client.request(method, path).status_code >= 400
    assert api.client.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": "file-unknown"}).status_code == 400
    admin(api, "POST", f"{PROJECTS}/{api.project_id}", json={})
    assert logs(api) == before


def test_what_the_server_does_by_itself_is_written_without_a_key(api: Api) -> None:
    file_id = api.upload(purpose="user_data")
    with api.database.transaction() as session:
        session.execute(update(File).where(File.id == file_id).values(expires_at=1))
    assert delete_expired_files(api.state) == 1
    (newest,) = logs(api, limit=1)
    assert (newest["type"], newest["file.deleted"]["id"]) == ("file.deleted", file_id)
    assert (newest["actor"], newest["request_id"]) == ({"type": "server", "api_key": None}, None)


def test_pages_and_filters(api_on_both: Api) -> None:
    api = api_on_both
    jobs = [api.create_job()["id"] for _ in range(3)]
    created = {"event_types[]": "fine_tuning.job.created"}
    page = api.client.get(LOGS, params={"limit": 2, **created}, headers=api.admin_headers).json()
    assert ([entry["fine_tuning.job.created"]["id"] for entry in page["data"]], page["has_more"]) == (jobs[:0:-1], True)
    (last,) = logs(api, after=page["last_id"], **created)
    assert last["fine_tuning.job.created"]["id"] == jobs[0]
    assert len(logs(api, **{"event_types[]": ["fine_tuning.job.created", "project.created"]})) == 5
    assert len(logs(api, **{"resource_ids[]": jobs[1]})) == 1
    assert {entry["project"]["name"] for entry in logs(api, **{"project_ids[]": api.other_project_id})} == {"other"}
    assert len(logs(api, **{"actor_ids[]": api.key.split("_")[1]})) == 3
    assert_error(api.client.get(LOGS, params={"after": "audit_log-unknown"}, headers=api.admin_headers), 400, "invalid_cursor", "after")


def test_the_database_lets_nobody_change_the_log(api_on_both: Api) -> None:
    engine = api_on_both.database.engine
    before = logs(api_on_both)
    statements = ["UPDATE audit_events SET action = 'nothing'", "DELETE FROM audit_events"]
    for statement in statements if engine.dialect.name == "sqlite" else [*statements, "TRUNCATE audit_events"]:
        with pytest.raises(DBAPIError, match="audit_events only grows"), engine.begin() as connection:
            connection.execute(text(statement))
    assert logs(api_on_both) == before
    assert before


def test_stock_client(live_api: Api) -> None:
    organization = live_api.openai.admin.organization
    project = organization.projects.create(name="team-a")
    found = list(organization.audit_logs.list(event_types=["project.created"], limit=1))
    assert [entry.project_created.id for entry in found if entry.project_created] == [project.id, live_api.other_project_id, live_api.project_id]
    assert found[0].actor is not None
    assert found[0].actor.api_key is not None
    assert found[0].actor.api_key.id == live_api.admin_key.split("_")[1]
