"""`sdft projects` and `sdft keys` against the real API, whose shapes are what matters here."""

import json
from collections.abc import Callable, Iterator

import pytest
from click.testing import Result
from typer.testing import CliRunner

from cli.errors import CliError
from cli.keys import seconds_of
from cli.main import app
from core.projects import FIRST_PROJECT
from core.settings import Settings
from tests.api.serving import Api, bearer, on_a_port, serve

Sdft = Callable[..., Result]


@pytest.fixture
def api(make_settings: Callable[..., Settings], sqlite_url: str) -> Iterator[Api]:
    with serve(make_settings(redis_url="redis://127.0.0.1:1/0", inference_urls=["http://127.0.0.1:1"], log_level="warning")) as opened:
        yield opened


@pytest.fixture
def sdft(api: Api, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sdft]:
    """Run `sdft` with these words and the operator's key."""
    with on_a_port(api.app) as base_url:
        monkeypatch.setenv("SDFT_BASE_URL", f"{base_url}/v1")
        monkeypatch.setenv("SDFT_API_KEY", api.admin_key)
        yield lambda *words: CliRunner().invoke(app, words)


def done(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def test_projects(sdft: Sdft) -> None:
    project_id = done(sdft("projects", "create", "support", "--max-running-jobs", "2")).strip()
    assert project_id.startswith("proj-")
    (row,) = [line for line in done(sdft("projects", "list")).splitlines() if line.startswith(project_id)]
    assert row.split()[1:4] == ["support", "active", "2"]
    assert "name: helpdesk" in done(sdft("projects", "update", "support", "--name", "helpdesk", "--max-running-jobs", "3"))
    assert done(sdft("projects", "archive", project_id)) == "archived helpdesk; its keys open nothing any more\n"
    assert project_id not in done(sdft("projects", "list"))
    (archived,) = [project for project in json.loads(done(sdft("projects", "list", "--archived", "--json"))) if project["id"] == project_id]
    assert (archived["name"], archived["status"], archived["max_running_jobs"]) == ("helpdesk", "archived", 3)


def test_a_key_is_printed_once_and_alone(sdft: Sdft, api: Api) -> None:
    created = sdft("keys", "create", "other", "chat bot", "--scope", "infer", "--scope", "read", "--expires-in", "90d")
    plain_key = done(created).strip()
    assert created.stderr == "keep it: it is not shown again\n"
    assert api.client.get("/v1/files", headers=bearer(plain_key)).status_code == 200
    key_id = plain_key.split("_")[1]
    listed = done(sdft("keys", "list", "other"))
    assert plain_key.split("_")[2] not in listed
    (row,) = [line for line in listed.splitlines() if line.startswith(key_id)]
    assert "chat bot" in row
    assert "read infer" in row
    (key,) = [key for key in json.loads(done(sdft("keys", "list", api.other_project_id, "--json"))) if key["id"] == key_id]
    assert key["expires_at"] == key["created_at"] + 90 * 86_400
    assert done(sdft("keys", "revoke", "other", key_id)) == f"revoked {key_id}\n"
    assert key_id not in done(sdft("keys", "list", "other"))


def test_what_the_server_refuses_is_one_line(sdft: Sdft, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    for words, said in (
        (("projects", "create", "other"), "there is a project called other already"),
        (("projects", "archive", FIRST_PROJECT), "can't be archived"),
        (("projects", "archive", "nobody"), "there is no project nobody; see `sdft projects list`"),
        (("projects", "update", "other"), "give --name or --max-running-jobs"),
        (("keys", "create", "other", "x", "--scope", "everything"), "scopes.0"),
        (("keys", "create", "other", "x", "--expires-in", "soon"), "write it as 90d"),
        (("keys", "revoke", "other", "unknown1"), "see `sdft keys list`"),
    ):
        result = sdft(*words)
        assert (result.exit_code, result.stdout) == (1, ""), words
        assert said in result.stderr, words
        assert len(result.stderr.splitlines()) == 1
    monkeypatch.setenv("SDFT_API_KEY", api.key)
    assert "Missing scope: admin" in sdft("projects", "list").stderr


@pytest.mark.parametrize(("text", "seconds"), [("45s", 45), ("30m", 1800), ("12h", 43_200), ("90d", 7_776_000)])
def test_durations(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "90", "d", "-1d", "1.5h", "1w", "1d ", "9999999999d"])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(CliError, match="write it as 90d"):
        seconds_of(text)
