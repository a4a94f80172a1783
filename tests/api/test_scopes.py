import pytest
from fastapi import FastAPI

from api.scopes import AREAS, scopes_for
from core.projects import create_key
from core.tables.projects import SCOPES, Scope
from tests.api.serving import Api, bearer
from tests.api.test_authentication import OPEN, every_route, refusal_before_the_body
from tests.api.test_errors import assert_error


def key_with(api: Api, *scopes: Scope) -> dict[str, str]:
    with api.database.transaction() as session:
        return bearer(create_key(session, api.project_id, "scoped", scopes=scopes))


def test_every_route_is_in_the_list(api: Api) -> None:
    """A route that is missing there answers 404 to everybody: give it a line in api/scopes.py."""
    routes = [(method, path) for method, path in every_route(api.app) if path not in OPEN and method != "HEAD"]
    assert len(routes) >= 29
    assert [(method, path) for method, path in routes if not scopes_for(method, path)] == []


def test_every_line_of_the_list_is_needed(api: Api) -> None:
    paths = [path for _, path in every_route(api.app)]
    assert [area for area, _, _ in AREAS if not any(path == area or path.startswith(f"{area}/") for path in paths)] == []


def test_a_route_that_is_in_no_line_cannot_be_reached(api: Api) -> None:
    app = api.app
    assert isinstance(app, FastAPI)
    app.get("/v1/forgotten")(lambda: "reached")
    app.get("/v1/filesystem")(lambda: "reached")
    for headers in (api.headers, api.admin_headers):
        for path in ("/v1/forgotten", "/v1/filesystem"):
            assert_error(api.client.get(path, headers=headers), 404, "unknown_url")


def test_each_scope_opens_its_routes_and_no_other_before_the_body_is_read(api: Api) -> None:
    for scope in SCOPES:
        headers = key_with(api, scope)
        for method, path in every_route(api.app):
            if path in OPEN or method == "HEAD" or scope in scopes_for(method, path):
                continue
            status, error = refusal_before_the_body(api.app, method, path, headers)
            assert (status, error["code"]) == (403, "insufficient_scope"), (scope, method, path)
            assert any(f"{needed}" in error["message"].split("Missing scope: ")[1] for needed in scopes_for(method, path))


def test_what_a_scope_opens(api: Api) -> None:
    reading, writing, inferring, managing = (key_with(api, scope) for scope in SCOPES)
    job = {"model": "tiny", "training_file": "file-unknown"}
    chat = {"model": "unknown", "messages": [{"role": "user", "content": "hi"}]}
    for headers, method, path, body, status in (
        (reading, "GET", "/v1/files", None, 200),
        (reading, "GET", "/v1/models", None, 200),
        (reading, "POST", "/v1/fine_tuning/jobs", job, 403),
        (reading, "DELETE", "/v1/files/file-unknown", None, 403),
        (reading, "GET", "/v1/organization/projects", None, 403),
        (writing, "POST", "/v1/fine_tuning/jobs", job, 400),
        (writing, "DELETE", "/v1/models/ft:unknown", None, 404),
        (writing, "GET", "/v1/files", None, 403),
        (writing, "POST", "/v1/chat/completions", chat, 403),
        (inferring, "POST", "/v1/chat/completions", chat, 404),
        (inferring, "POST", "/v1/completions", {"model": "unknown", "prompt": "hi"}, 404),
        (inferring, "GET", "/v1/models", None, 200),
        (inferring, "GET", "/v1/models/tiny/adapter", None, 403),
        (inferring, "GET", "/v1/files", None, 403),
        (managing, "GET", "/v1/organization/projects", None, 200),
        (managing, "GET", "/v1/files", None, 403),
    ):
        answer = api.client.request(method, path, json=body, headers=headers)
        assert answer.status_code == status, (method, path, answer.text)


def test_an_ordinary_key_opens_all_of_its_project_and_nothing_of_the_server(api: Api) -> None:
    for method, path in every_route(api.app):
        if path in OPEN or method == "HEAD":
            continue
        refused = not {"read", "write", "infer"} & set(scopes_for(method, path))
        assert refused == path.startswith("/v1/organization"), path
    assert_error(api.client.get("/v1/organization/projects"), 403, "insufficient_scope")


def test_a_key_without_scopes_opens_nothing(api: Api) -> None:
    headers = key_with(api)
    for path in ("/v1/files", "/v1/models", "/openapi.json"):
        assert_error(api.client.get(path, headers=headers), 403, "insufficient_scope")


@pytest.mark.parametrize("path", ["/v1/filesx", "/v1/files-x", "/v1", "/", "/v1/organizations", "/healthz/x", "/V1/files", "//v1/files", "/v1//files"])
def test_paths_beside_the_list(path: str) -> None:
    assert scopes_for("GET", path) == ()
