import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import OpenAI

from api import authentication
from core.database import unix_now
from core.tables.projects import ApiKey
from tests.api.serving import Api, bearer
from tests.api.test_errors import assert_error


def call(api: Api, method: str, path: str = "", project_id: str | None = None, **options: Any) -> Any:
    return api.client.request(method, f"/v1/organization/projects/{project_id or api.project_id}/api_keys{path}", headers=api.admin_headers, **options)


def create(api: Api, **fields: Any) -> dict[str, Any]:
    answer = call(api, "POST", json={"name": "laptop", **fields})
    assert answer.status_code == 200, answer.text
    key: dict[str, Any] = answer.json()
    return key


def test_key_is_shown_once_and_works_at_once(api_on_both: Api) -> None:
    api = api_on_both
    created = create(api)
    plain_key = created.pop("value")
    assert plain_key.startswith(f"sdft_{created['id']}_")
    expected = {
        "object": "organization.project.api_key",
        "name": "laptop",
        "redacted_value": f"sdft_{created['id']}_...",
        "last_used_at": None,
        "expires_at": None,
        "scopes": ["read", "write", "infer"],
        "project_id": api.project_id,
    }
    assert {name: created[name] for name in expected} == expected
    assert call(api, "GET", f"/{created['id']}").json() == created
    assert created in call(api, "GET").json()["data"]
    assert api.client.get("/v1/files", headers=bearer(plain_key)).status_code == 200
    assert abs(call(api, "GET", f"/{created['id']}").json()["last_used_at"] - unix_now()) < 10
    secret = plain_key.split("_")[2]
    for answer in (call(api, "GET"), call(api, "GET", f"/{created['id']}"), api.client.get("/v1/organization/audit_logs", headers=api.admin_headers)):
        assert secret not in answer.text
    with api.database.reading() as session:
        assert session.get_one(ApiKey, created["id"]).key_sha256 == hashlib.sha256(plain_key.encode()).hexdigest()


def test_scopes_are_those_that_were_asked_for(api: Api) -> None:
    key = create(api, scopes=["infer", "read", "read"])
    assert key["scopes"] == ["read", "infer"]
    assert_error(api.client.delete("/v1/files/file-1", headers=bearer(key["value"])), 403, "insufficient_scope")
    operator = create(api, scopes=["admin"])
    assert api.client.get("/v1/organization/projects", headers=bearer(operator["value"])).status_code == 200


def test_expiry(api_on_both: Api) -> None:
    api = api_on_both
    soon = create(api, expires_in_seconds=60)
    assert abs(soon["expires_at"] - unix_now() - 60) < 5
    at = int(unix_now()) + 3600
    later = create(api, expires_at=at)
    assert later["expires_at"] == at
    assert api.client.get("/v1/files", headers=bearer(later["value"])).status_code == 200
    with api.database.transaction() as session:
        session.get_one(ApiKey, soon["id"]).expires_at = unix_now() - 1
    assert_error(api.client.get("/v1/files", headers=bearer(soon["value"])), 401, "invalid_api_key")
    assert call(api, "GET", f"/{soon['id']}").status_code == 200, "an expired key can be seen, and revoked"


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"name": ""}, "string_too_short", "name"),
        ({"name": "x" * 101}, "string_too_long", "name"),
        ({"name": "a\x00"}, "invalid_text", "name"),
        ({"scopes": []}, "too_short", "scopes"),
        ({"scopes": ["api.files.read"]}, "literal_error", "scopes.0"),
        ({"scopes": "read"}, "list_type", "scopes"),
        ({"expires_in_seconds": 0}, "greater_than_equal", "expires_in_seconds"),
        ({"expires_in_seconds": 10**10}, "less_than_equal", "expires_in_seconds"),
        ({"expires_at": 1_700_000_000}, "invalid_value", "expires_at"),
        ({"expires_at": 10**30}, "int_type", "expires_at"),
        ({"expires_at": 10**12}, "invalid_value", "expires_at"),
        ({"expires_at": 4_000_000_000, "expires_in_seconds": 60}, "invalid_value", "expires_at"),
    ],
)
def test_keys_that_cannot_be(api: Api, fields: dict[str, Any], code: str, param: str) -> None:
    assert_error(call(api, "POST", json={"name": "laptop", **fields}), 400, code, param)
    assert len(call(api, "GET").json()["data"]) == 2


def test_revoked_key_is_gone_within_seconds(api_on_both: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api = api_on_both
    assert authentication.REMEMBERED_SECONDS <= 5
    monkeypatch.setattr(authentication, "REMEMBERED_SECONDS", 0.5)
    key = create(api)
    assert api.client.get("/v1/files", headers=bearer(key["value"])).status_code == 200
    assert call(api, "DELETE", f"/{key['id']}").json() == {"id": key["id"], "object": "organization.project.api_key.deleted", "deleted": True}
    time.sleep(0.6)
    assert_error(api.client.get("/v1/files", headers=bearer(key["value"])), 401, "invalid_api_key")
    for answer in (call(api, "GET", f"/{key['id']}"), call(api, "DELETE", f"/{key['id']}")):
        assert_error(answer, 404, "api_key_not_found", "key_id")
    assert key["id"] not in call(api, "GET").text


def test_a_key_cannot_revoke_itself(api: Api) -> None:
    assert_error(call(api, "DELETE", f"/{api.admin_key.split('_')[1]}"), 409, "own_key", "key_id")
    assert call(api, "GET").status_code == 200


def test_a_revoked_key_that_is_still_remembered_changes_nothing(api_on_both: Api) -> None:
    """Neither keys nor projects: else it would make itself another key within the seconds in which it opens the door."""
    api = api_on_both
    key = create(api, scopes=["admin", "read"])
    headers = bearer(key["value"])
    keys, projects = f"/v1/organization/projects/{api.project_id}/api_keys", "/v1/organization/projects"
    assert api.client.get(projects, headers=headers).status_code == 200
    assert call(api, "DELETE", f"/{key['id']}").status_code == 200
    assert api.client.get(projects, headers=headers).status_code == 200, "the test is worth something while the key is remembered"
    for method, path, body in (
        ("POST", keys, {"name": "another", "scopes": ["admin"]}),
        ("DELETE", f"{keys}/{api.admin_key.split('_')[1]}", None),
        ("POST", projects, {"name": "another"}),
        ("POST", f"{projects}/{api.other_project_id}", {"name": "renamed"}),
        ("POST", f"{projects}/{api.other_project_id}/archive", None),
    ):
        assert_error(api.client.request(method, path, headers=headers, json=body), 401, "invalid_api_key")
    assert api.client.get(f"{projects}/{api.other_project_id}", headers=api.admin_headers).json()["status"] == "active"


def test_two_keys_that_revoke_each_other_at_once(api_on_both: Api) -> None:
    api = api_on_both
    first, second = (create(api, scopes=["admin"]) for _ in range(2))
    path = f"/v1/organization/projects/{api.project_id}/api_keys"
    for acting in (first, second):
        assert api.client.get(path, headers=bearer(acting["value"])).status_code == 200
    with ThreadPoolExecutor(2) as pool:
        pairs = ((first, second), (second, first))
        answers = list(pool.map(lambda pair: api.client.delete(f"{path}/{pair[1]['id']}", headers=bearer(pair[0]["value"])), pairs))
    assert sorted(answer.status_code for answer in answers) == [200, 401]


def test_the_last_lasting_admin_key_stays(api_on_both: Api) -> None:
    """An admin key that expires may not leave the server without one that does not: by revoking it or by archiving its project."""
    api = api_on_both
    last = api.admin_key.split("_")[1]
    expiring = create(api, scopes=["admin"], expires_in_seconds=3600)
    projects = "/v1/organization/projects"
    headers = bearer(expiring["value"])
    assert_error(api.client.delete(f"{projects}/{api.project_id}/api_keys/{last}", headers=headers), 409, "last_admin_key")
    assert call(api, "GET", f"/{last}").status_code == 200
    other = call(api, "POST", project_id=api.other_project_id, json={"name": "x", "scopes": ["admin"]}).json()
    assert api.client.delete(f"{projects}/{api.project_id}/api_keys/{last}", headers=headers).status_code == 200
    assert_error(api.client.post(f"{projects}/{api.other_project_id}/archive", headers=headers), 409, "last_admin_key")
    assert api.client.get(projects, headers=bearer(other["value"])).status_code == 200


def test_keys_are_listed_by_project_newest_first_in_pages(api_on_both: Api) -> None:
    api = api_on_both
    with api.database.transaction() as session:
        for number in range(5):
            row = {"project_id": api.other_project_id, "name": "k", "key_sha256": "0", "scopes": ["read"], "created_at": 4_000_000_000 + number // 2}
            session.add(ApiKey(id=f"key0000{number}", **row))
    first = call(api, "GET", project_id=api.other_project_id, params={"limit": 2}).json()
    assert [key["id"] for key in first["data"]] == ["key00004", "key00003"]
    second = call(api, "GET", project_id=api.other_project_id, params={"limit": 3, "after": first["last_id"]}).json()
    assert [key["id"] for key in second["data"]] == ["key00002", "key00001", "key00000"]
    assert second["has_more"] is True
    assert_error(call(api, "GET", params={"after": "key00004"}), 400, "invalid_cursor", "after")


def test_a_key_is_found_in_its_own_project_only(api: Api) -> None:
    path = f"/{api.other_key.split('_')[1]}"
    assert call(api, "GET", path, project_id=api.other_project_id).status_code == 200
    for method in ("GET", "DELETE"):
        assert_error(call(api, method, path), 404, "api_key_not_found", "key_id")
    assert api.client.get("/v1/files", headers=api.other_headers).status_code == 200


def test_stock_client(live_api: Api) -> None:
    keys = live_api.openai.admin.organization.projects.api_keys
    key_id = live_api.other_key.split("_")[1]
    (listed,) = keys.list(live_api.other_project_id)
    assert (listed.id, listed.redacted_value) == (key_id, f"sdft_{key_id}_...")
    assert keys.retrieve(key_id, project_id=live_api.other_project_id) == listed
    assert keys.delete(key_id, project_id=live_api.other_project_id).deleted is True
    assert list(keys.list(live_api.other_project_id)) == []


def test_creating_a_key_with_the_stock_client(live_api: Api) -> None:
    """It has no method for that; this is the way in docs/api.md."""
    client = OpenAI(base_url=f"{live_api.base_url}/v1", api_key=live_api.admin_key, admin_api_key=live_api.admin_key)
    project = client.admin.organization.projects.create(name="support")
    body = {"name": "laptop", "scopes": ["read", "infer"]}
    plain_key = client.post(f"/organization/projects/{project.id}/api_keys", cast_to=dict, body=body)["value"]
    assert client.with_options(api_key=plain_key).models.list().data[0].id == "tiny"
