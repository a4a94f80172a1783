import json
import os
import re
import shutil
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from local_stack import doctor, up, valkey
from local_stack.lock import data_directory_lock
from local_stack.ports import free_local_port
from tests.fixtures.s3_server import Bucket


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


def test_a_misspelled_setting_is_a_warning(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDFT_DEVIC", "cuda")
    monkeypatch.setenv("SDFT_XYZZY", "1")
    result = CliRunner().invoke(app, ["doctor", "--data-dir", str(tmp_path / "data"), "--port", str(port)])
    assert result.exit_code == 0
    assert "warning  SDFT_DEVIC: there is no such setting\n         mend it: write SDFT_DEVICE\n" in result.stdout
    assert "warning  SDFT_XYZZY: there is no such setting\n         mend it: unset it" in result.stdout


def name_bucket(monkeypatch: pytest.MonkeyPatch, bucket: Bucket, **changes: str) -> None:
    for name, value in (bucket.settings | changes).items():
        monkeypatch.setenv(f"SDFT_{name.upper()}", value)


def test_a_bucket_that_can_be_listed_is_well_and_stays_as_it_is(tmp_path: Path, port: int, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    name_bucket(monkeypatch, bucket)
    assert problems(tmp_path / "data", port) == []
    assert f"storage {bucket.url}" in [finding.what for finding in doctor.examine(tmp_path / "data", None, port)]
    assert bucket.keys() == []


def test_a_bucket_that_is_not_there_is_a_problem_in_the_store_s_words(tmp_path: Path, port: int, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    name_bucket(monkeypatch, bucket, storage_url="s3://no-such-bucket/prefix")
    result = CliRunner().invoke(app, ["doctor", "--data-dir", str(tmp_path / "data"), "--port", str(port)])
    assert result.exit_code == 1
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("problem")]
    assert line.startswith("problem  storage s3://no-such-bucket/prefix: ")
    assert "404 Not Found" in line
    assert "secret" not in result.stdout


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
        assert problems(tmp_path, taken_port) == [f"port {taken_port} on 127.0.0.1: in use by another program"]
        with data_directory_lock(tmp_path):
            assert problems(tmp_path, taken_port) == []


def test_the_proposed_command_keeps_what_was_given(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        given, bare = (
            next(f.mend for f in doctor.examine(data_dir, host, port, inference) if f.problem)
            for data_dir, host, inference in ((tmp_path / "my data", "127.0.0.1", "embedded"), (None, None, None))
        )
    assert re.fullmatch(rf"sdft up --data-dir '{tmp_path}/my data' --host 127\.0\.0\.1 --inference embedded --port \d+", given)
    assert re.fullmatch(r"sdft up --port \d+", bare)


def test_an_address_of_another_machine_is_a_problem(tmp_path: Path) -> None:
    (finding,) = [finding for finding in doctor.examine(tmp_path, "203.0.113.7", 8000) if finding.problem]
    assert (finding.what, finding.mend) == ("port 8000 on 203.0.113.7", "choose others with --host and --port")


def test_a_file_in_place_of_the_directory_is_a_problem(tmp_path: Path, port: int) -> None:
    (tmp_path / "data").write_text("")
    assert problems(tmp_path / "data", port) == [f"data directory {tmp_path / 'data'}: it is not a directory"]
    assert problems(tmp_path / "data" / "deeper", port) == [f"data directory {tmp_path / 'data' / 'deeper'}: {tmp_path / 'data'} is not a directory"]


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
    assert problems(tmp_path, port) == ["broker: SDFT_REDIS_URL: it doesn't answer a ping"]


def test_a_valkey_that_does_not_run_is_a_problem(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "valkey-server"
    broken.write_text("#!/bin/sh\necho 'wrong libc' >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(valkey, "find_program", lambda: broken)
    assert problems(tmp_path, port) == [f"valkey {broken}: it doesn't run: wrong libc"]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("package:no_such_package/model.gguf", "the package no_such_package is not installed"),
        ("package:json/model.gguf", "the package json has no model.gguf"),
        ("package:json.decoder/model.gguf", "the package json.decoder is not installed"),
    ],
)
def test_a_base_model_without_a_source_is_a_problem(tmp_path: Path, port: int, source: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDFT_BASE_MODELS", json.dumps([{"id": "mine", "source": source}]))
    assert problems(tmp_path, port) == [f"base model mine: {problem}"]


def test_what_a_base_model_is_made_from_has_to_be_readable(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "model"
    source.mkdir()
    monkeypatch.setenv("SDFT_BASE_MODELS", json.dumps([{"id": "mine", "source": str(source)}]))
    assert problems(tmp_path, port) == [f"base model mine (will be prepared at the first start): {source} has no config.json"]
    (source / "config.json").write_text("{}")
    assert problems(tmp_path, port) == [f"base model mine (will be prepared at the first start): {source} has no *.safetensors"]
    (source / "model.safetensors").write_text("")
    assert problems(tmp_path, port) == []
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).suffix != ".safetensors")  # root may read anything
    assert problems(tmp_path, port) == [f"base model mine (will be prepared at the first start): {source / 'model.safetensors'} can't be read"]


def test_a_model_of_the_hub_needs_the_hub(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDFT_BASE_MODELS", json.dumps([{"id": "mine", "source": "hub:org/mine", "revision": "abc"}]))
    assert problems(tmp_path, port) == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (problem,) = problems(tmp_path, port)
    assert "has to be downloaded first, and HF_HUB_OFFLINE forbids that" in problem


@pytest.mark.parametrize(("name", "value"), [("SDFT_PORT", "many"), ("SDFT_BASE_MODELS", "not json"), ("SDFT_LEASE_SECONDS", "-1"), ("SDFT_BASE_MODELS", "[]")])
def test_wrong_settings_are_named(tmp_path: Path, name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    (finding,) = [finding for finding in doctor.examine(tmp_path, None, None) if finding.problem]
    assert name.removeprefix("SDFT_").lower() in str(finding.problem).lower()


def test_a_base_model_that_does_not_exist(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDFT_BASE_MODELS", json.dumps([{"id": "mine", "source": "/nowhere/model"}]))
    assert problems(tmp_path, port) == ["base model mine (will be prepared at the first start): /nowhere/model does not exist"]


def test_vllm_that_is_not_installed_is_found_before_the_start(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDFT_INFERENCE", "vllm")
    monkeypatch.setenv("SDFT_VLLM_PYTHON", str(tmp_path / "none"))
    assert any("vLLM is not installed" in problem for problem in problems(tmp_path / "data", port))
    monkeypatch.delenv("SDFT_INFERENCE")
    result = CliRunner().invoke(app, ["doctor", "--data-dir", str(tmp_path / "data"), "--port", str(port), "--inference", "vllm"])
    assert result.exit_code == 1
    assert "vLLM is not installed" in result.stdout
    monkeypatch.setenv("SDFT_INFERENCE", "vllm")
    monkeypatch.setenv("SDFT_INFERENCE_URLS", "http://127.0.0.1:9")
    assert not [f for f in doctor.examine(tmp_path / "data", None, port) if f.hinders], "servers that run already are started by somebody else"
