from typing import Any

import pytest

from core.projects import FIRST_PROJECT
from tests.api.serving import Api, bearer
from tests.api.test_errors import assert_error
from tests.rows import add_job, add_project, get_job

PROJECTS = "/v1/organization/projects"


def call(api: Api, method: str, path: str = "", **options: Any) -> Any:
    return api.client.request(method, f"{PROJECTS}{path}", headers=api.admin_headers, **options)


def create(api: Api, name: str = "team-a", **fields: Any) -> dict[str, Any]:
    answer = call(api, "POST", json={"name": name, **fields})
    assert answer.status_code == 200, answer.text
    project: dict[str, Any] = answer.json()
    return project


def test_project_as_created(api_on_both: Api) -> None:
    api = api_on_both
    project = create(api, max_running_jobs=2)
    assert project["id"].startswith("proj-")
    expected = {"object": "organization.project", "name": "team-a", "archived_at": None, "status": "active", "max_running_jobs": 2}
    assert {name: project[name] for name in expected} == expected
    assert call(api, "GET", f"/{project['id']}").json() == project
    assert create(api, "team-b", geography="EU")["max_running_jobs"] is None


def test_names_that_cannot_be(api_on_both: Api) -> None:
    api = api_on_both
    for name in ("", "a:b", "a b", "x" * 65, "\u0000"):
        assert_error(call(api, "POST", json={"name": name}), 400, "invalid_project_name", "name")
    assert_error(call(api, "POST", json={}), 400, "missing", "name")
    answer = call(api, "POST", json={"name": "other"})
    assert_error(answer, 409, "project_exists", "name")
    assert answer.headers["x-should-retry"] == "false"
    project = create(api)
    assert_error(call(api, "POST", f"/{project['id']}", json={"name": "other"}), 409, "project_exists", "name")
    assert_error(call(api, "POST", f"/{project['id']}", json={"name": "a/b"}), 400, "invalid_project_name", "name")


@pytest.mark.parametrize("value", [0, -1, 100_001, "3", 1.5])
def test_limits_of_jobs_that_cannot_be(api: Api, value: Any) -> None:
    for path in ("", f"/{api.project_id}"):
        answer = call(api, "POST", path, json={"name": "team-a" if path == "" else FIRST_PROJECT, "max_running_jobs": value})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "max_running_jobs"


def test_update_changes_what_is_given(api_on_both: Api) -> None:
    api = api_on_both
    path = f"/{create(api, max_running_jobs=2)['id']}"
    assert call(api, "POST", path, json={}).json()["max_running_jobs"] == 2
    renamed = call(api, "POST", path, json={"name": "team-z"}).json()
    assert (renamed["name"], renamed["max_running_jobs"]) == ("team-z", 2)
    assert call(api, "POST", path, json={"max_running_jobs": 5}).json()["max_running_jobs"] == 5
    assert call(api, "POST", path, json={"max_running_jobs": None}).json()["max_running_jobs"] is None
    assert call(api, "GET", path).json()["name"] == "team-z"


def test_list_is_paged_newest_first_and_leaves_archived_ones_out(api_on_both: Api) -> None:
    api = api_on_both
    ids = [create(api, f"team-{number}")["id"] for number in range(4)]
    assert call(api, "POST", f"/{ids[2]}/archive").status_code == 200
    page = call(api, "GET", params={"limit": 2}).json()
    assert ([project["id"] for project in page["data"]], page["has_more"], page["last_id"]) == ([ids[3], ids[1]], True, ids[1])
    page = call(api, "GET", params={"limit": 2, "after": page["last_id"]}).json()
    assert [project["id"] for project in page["data"]] == [ids[0], api.other_project_id]
    everything = call(api, "GET", params={"include_archived": True}).json()["data"]
    assert [project["status"] for project in everything] == ["active", "archived", "active", "active", "active", "active"]
    assert_error(call(api, "GET", params={"after": "proj-unknown"}), 400, "invalid_cursor", "after")
    assert_error(call(api, "GET", params={"limit": 101}), 400, "less_than_equal", "limit")


def test_an_archived_project_keeps_its_jobs_and_its_keys_open_nothing(api_on_both: Api) -> None:
    api = api_on_both
    job_id = add_job(api.database, api.other_project_id, "queued")
    archived = call(api, "POST", f"/{api.other_project_id}/archive").json()
    assert archived["status"] == "archived"
    assert archived["archived_at"] >= archived["created_at"]
    assert call(api, "POST", f"/{api.other_project_id}/archive").json() == archived
    assert get_job(api.database, job_id).status == "queued"
    assert_error(api.client.get("/v1/files", headers=api.other_headers), 401, "invalid_api_key")
    assert_error(call(api, "POST", f"/{api.other_project_id}", json={"name": "again"}), 409, "project_archived", "project_id")
    assert_error(call(api, "POST", f"/{api.other_project_id}/api_keys", json={"name": "late"}), 409, "project_archived", "project_id")


def test_nobody_locks_himself_out(api: Api) -> None:
    assert_error(call(api, "POST", f"/{api.project_id}/archive"), 409, "first_project", "project_id")
    assert_error(call(api, "POST", f"/{api.project_id}", json={"name": "another"}), 409, "first_project", "project_id")
    assert call(api, "POST", f"/{api.project_id}", json={"name": FIRST_PROJECT, "max_running_jobs": 1}).status_code == 200
    key = call(api, "POST", f"/{api.other_project_id}/api_keys", json={"name": "operator", "scopes": ["admin"]}).json()["value"]
    answer = api.client.post(f"{PROJECTS}/{api.other_project_id}/archive", headers=bearer(key))
    assert_error(answer, 409, "own_project")


def test_unknown_project(api: Api) -> None:
    for method, path in (("GET", ""), ("POST", ""), ("POST", "/archive"), ("GET", "/api_keys"), ("POST", "/api_keys"), ("GET", "/api_keys/x")):
        options = {"json": {"name": "x"}} if method == "POST" and path != "/archive" else {}
        assert_error(call(api, method, f"/proj-unknown{path}", **options), 404, "project_not_found", "project_id")


def test_stock_client(live_api: Api) -> None:
    projects = live_api.openai.admin.organization.projects
    project = projects.create(name="team-a")
    assert (project.object, project.status) == ("organization.project", "active")
    assert projects.retrieve(project.id) == project
    assert projects.update(project.id, name="team-b").name == "team-b"
    assert [found.name for found in projects.list(limit=1)] == ["team-b", "other", "default"]
    assert projects.archive(project.id).status == "archived"
    assert [found.name for found in projects.list(limit=1)] == ["other", "default"]


def test_a_project_that_somebody_else_made_is_managed_too(api: Api) -> None:
    project_id = add_project(api.database, "by-hand")
    assert call(api, "GET", f"/{project_id}").json()["name"] == "by-hand"
