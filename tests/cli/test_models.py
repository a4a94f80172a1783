import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tests.cli.stub_server import StubServer, json_answer, refusal

MODEL = {"id": "ft:base:default:support/v2:abc", "object": "model", "created": 1_700_000_000, "owned_by": "default", "base_model": "base", "status": "ready"}
ADAPTER = b"weights" * 1000


def test_list_and_get(sdft: Callable[..., Result], stub: StubServer) -> None:
    stub.routes["GET /models"] = lambda _: json_answer({"object": "list", "data": [{"id": "base", "object": "model", "created": 1}, MODEL]})
    stub.routes["GET /models/ft%3Abase%3Adefault%3Asupport%2Fv2%3Aabc"] = lambda _: json_answer(MODEL)
    assert MODEL["id"] in sdft("models", "list").stdout
    assert json.loads(sdft("models", "get", MODEL["id"], "--json").stdout) == MODEL
    assert "base_model: base" in sdft("models", "get", MODEL["id"]).stdout


def test_delete(sdft: Callable[..., Result], stub: StubServer) -> None:
    stub.routes["DELETE /models/.*"] = lambda request: json_answer({"id": "x", "object": "model", "deleted": True})
    assert sdft("models", "delete", MODEL["id"]).stdout == f"deleted {MODEL['id']}; its job's other models, such as checkpoints, stay\n"
    assert stub.received[-1].path.endswith("support%2Fv2%3Aabc")


def test_download_is_named_after_the_model_and_checked(sdft: Callable[..., Result], stub: StubServer, tmp_path: Path) -> None:
    stub.routes["GET /models/.*/adapter"] = lambda _: (200, {"x-sha256": hashlib.sha256(ADAPTER).hexdigest()}, ADAPTER)
    result = sdft("models", "download", MODEL["id"])
    assert result.exit_code == 0, result.stderr
    assert result.stderr == f"its SHA-256 is the server's: {hashlib.sha256(ADAPTER).hexdigest()}\n"
    assert (tmp_path / "ft-base-default-support-v2-abc.tar.gz").read_bytes() == ADAPTER
    assert stub.received[-1].query == {"format": "peft"}


def test_a_folder_that_does_not_exist_is_named_before_anything_is_asked(sdft: Callable[..., Result], stub: StubServer, tmp_path: Path) -> None:
    result = sdft("models", "download", MODEL["id"], "-o", str(tmp_path / "nope" / "x.tgz"))
    assert (result.exit_code, result.stderr) == (1, f"error: the folder {tmp_path / 'nope'} does not exist\n")
    assert stub.received == []


def test_a_damaged_adapter_is_refused(sdft: Callable[..., Result], stub: StubServer, tmp_path: Path) -> None:
    stub.routes["GET /models/.*/adapter"] = lambda _: (200, {"x-sha256": hashlib.sha256(b"other").hexdigest()}, ADAPTER)
    assert sdft("models", "download", MODEL["id"], "-o", "a.tar.gz").exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_form_that_the_server_makes_first_is_waited_for(
    sdft: Callable[..., Result], stub: StubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.models.AGAIN_SECONDS", 0.01)
    answers = iter([refusal(503, "is being made", "export_in_progress")] * 2 + [(200, {}, ADAPTER)])
    stub.routes["GET /models/.*/adapter"] = lambda _: next(answers)
    result = sdft("models", "download", MODEL["id"], "--format", "gguf")
    assert result.exit_code == 0, result.stderr
    first, *waiting = result.stderr.splitlines()
    assert first == "the server makes the gguf form first unless it has it, which can take minutes"
    assert waiting == ["the server is making it, for 0 s now …"] * 2
    assert (tmp_path / "ft-base-default-support-v2-abc.gguf.tar.gz").read_bytes() == ADAPTER
    assert [request.query for request in stub.received] == [{"format": "gguf"}] * 3


def test_a_form_that_can_t_be_made_is_not_waited_for(sdft: Callable[..., Result], stub: StubServer) -> None:
    stub.routes["GET /models/.*/adapter"] = lambda _: refusal(400, "no such form", "export_not_possible")
    result = sdft("models", "download", MODEL["id"], "--format", "gguf")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[1:] == ["error: no such form"]
