import json
import os
import shutil
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from local_stack import doctor, up, valkey
from local_stack.lock import data_directory_lock
from local_stack.ports import free_local_port


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SDFT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def port() -> int:
    return free_local_port()


def problems(data_dir: Path, port: int) -> list[str]:
    return [f"{finding.what}: {finding.problem}" for finding in doctor.examine(data_dir, None, port) if finding.problem is not None]


def test_all_is_well_here_and_nothing_is_made(tmp_path: Path, port: int) -> None:
    assert problems(tmp_path / "data", port) == []
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_a_line_for_each_and_exits_0(tmp_path: Path, port: int) -> None:
    result = CliRunner().invoke(app, ["doctor", "--data-dir", str(tmp_path / "data"), "--port", str(port)])
    assert result.exit_code == 0
    assert all(line.startswith("ok ") for line in result.stdout.splitlines())
    assert f"port {port}" in result.stdout


def test_the_command_exits_1_and_says_how_to_mend_it(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up, "TRAINING_PACKAGES", ("torch", "no_such_package"))
    result = CliRunner().invoke(app, ["doctor", "--data-dir", str(tmp_path / "data"), "--port", str(port)])
    assert result.exit_code == 1
    assert "problem  training packages: not installed: no_such_package\n         mend it: pip install 'sdft[train]'" in result.stdout


def test_a_port_in_use_is_a_problem_unless_we_use_it(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        taken_port = taken.getsockname()[1]
        assert [text for text in problems(tmp_path, taken_port) if f"port {taken_port}" in text and "in use" in text]
        with data_directory_lock(tmp_path):
            assert problems(tmp_path, taken_port) == []


def test_a_file_in_place_of_the_directory_is_a_problem(tmp_path: Path, port: int) -> None:
    (tmp_path / "data").write_text("")
    assert "is not a directory" in problems(tmp_path / "data", port)[0]


def test_a_directory_that_cannot_be_written_is_a_problem(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    assert "is not writable" in problems(tmp_path / "data", port)[0]


def test_a_full_disk_is_a_problem(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "only 0.9 GiB free" in problems(tmp_path / "data", port)[0]


def test_no_valkey_is_a_problem_unless_a_broker_is_set(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(valkey, "find_program", lambda: None)
    assert problems(tmp_path, port) == ["valkey: no server program found"]
    monkeypatch.setenv("SDFT_REDIS_URL", "redis://127.0.0.1:1/0")
    assert problems(tmp_path, port) == []


def test_a_valkey_that_does_not_run_is_a_problem(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "valkey-server"
    broken.write_text("#!/bin/sh\necho 'wrong libc' >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(valkey, "find_program", lambda: broken)
    assert problems(tmp_path, port) == [f"valkey {broken}: it doesn't run: wrong libc"]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("/nowhere/model", "/nowhere/model does not exist"),
        ("package:no_such_package/model.gguf", "the package no_such_package is not installed"),
        ("package:json/model.gguf", "the package json has no model.gguf"),
        ("package:json.decoder/model.gguf", "the package json.decoder is not installed"),
    ],
)
def test_a_base_model_without_a_source_is_a_problem(tmp_path: Path, port: int, source: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDFT_BASE_MODELS", json.dumps([{"id": "mine", "source": source}]))
    assert problems(tmp_path, port) == [f"base model mine: {problem}"]


@pytest.mark.parametrize(("name", "value"), [("SDFT_PORT", "many"), ("SDFT_BASE_MODELS", "not json"), ("SDFT_LEASE_SECONDS", "-1"), ("SDFT_BASE_MODELS", "[]")])
def test_wrong_settings_are_named(tmp_path: Path, name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    (finding,) = [finding for finding in doctor.examine(tmp_path, None, None) if finding.problem]
    assert name.removeprefix("SDFT_").lower() in str(finding.problem).lower()
