"""`python -m inference` as a process."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from inference.__main__ import main, parse_arguments
from tests.inference.serving import wait_until


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def process(model_dir: Path, adapters_dir: Path, *extra: str) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    port = free_port()
    words = ["--base-model", "tiny", "--model-dir", str(model_dir), "--adapters-dir", str(adapters_dir), "--port", str(port), "--dtype", "float32", *extra]
    environment = {**os.environ, "SDFT_INFERENCE_API_KEY": "geheim"}
    environment.pop("OMP_WAIT_POLICY", None)
    started = subprocess.Popen([sys.executable, "-m", "inference", *words], env=environment)
    try:
        yield started, f"http://127.0.0.1:{port}"
    finally:
        started.kill()
        started.wait()


def answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False


@pytest.mark.slow
def test_the_process_serves_adapters_and_stops_when_told(tiny_model_dir: Path, adapters_dir: Path) -> None:
    with process(tiny_model_dir, adapters_dir, "--threads", "1", "--max-batch", "2") as (started, url):
        wait_until(lambda: answers(url), seconds=240)
        with httpx2.Client(base_url=url, headers={"authorization": "Bearer geheim"}, timeout=30, trust_env=False) as client:
            loaded = client.post("/v1/load_lora_adapter", json={"lora_name": "first", "lora_path": str(adapters_dir / "first")})
            assert loaded.status_code == 200
            answer = client.post("/v1/completions", json={"model": "first", "prompt": "the lamp", "max_tokens": 4, "ignore_eos": True})
            assert answer.json()["usage"]["completion_tokens"] == 4
            assert httpx2.get(f"{url}/v1/models", trust_env=False).status_code == 401
        started.send_signal(signal.SIGTERM)
        assert started.wait(timeout=20) in (0, -signal.SIGTERM)


@pytest.mark.slow
def test_an_unusable_model_is_one_line_and_no_traceback(tmp_path: Path) -> None:
    """And torch, whose thread pool reads OMP_WAIT_POLICY once, was not loaded before that was set."""
    program = (
        "import sys, inference.__main__ as main, os; print('torch' in sys.modules)\n"
        f"sys.argv = ['inference', '--base-model', 'tiny', '--model-dir', {str(tmp_path)!r}, '--adapters-dir', {str(tmp_path)!r}]\n"
        "status = main.main(); print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY']); sys.exit(status)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    assert (run.returncode, run.stdout.splitlines()) == (1, ["False", "True passive"])
    assert len(run.stderr.splitlines()) == 1
    assert str(tmp_path) in run.stderr


def test_device_and_precision_come_from_the_environment_unless_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["--base-model", "a", "--model-dir", "b", "--adapters-dir", "c"]
    monkeypatch.setenv("SDFT_DEVICE", "cpu")
    monkeypatch.setenv("SDFT_DTYPE", "")
    assert (parse_arguments(needed).device, parse_arguments(needed).dtype) == ("cpu", "auto")
    monkeypatch.setenv("SDFT_DTYPE", "float32")
    assert parse_arguments(needed).dtype == "float32"
    assert parse_arguments([*needed, "--dtype", "bfloat16"]).dtype == "bfloat16"
    monkeypatch.setenv("SDFT_DTYPE", "float16")
    with pytest.raises(SystemExit):
        parse_arguments(needed)


@pytest.mark.parametrize("words", [["--threads", "0"], ["--max-batch", "0"], ["--device", "tpu"]])
def test_senseless_arguments_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--base-model", "a", "--model-dir", "b", "--adapters-dir", "c", *words])
    assert words[0] in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--adapters-dir", "c", "--uploads-dir", "d"]])
def test_adapters_are_in_a_shared_directory_or_sent(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--base-model", "a", "--model-dir", "b", *words])
    assert "--uploads-dir" in capsys.readouterr().err


def test_no_server_is_sent_adapters_without_a_key(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("SDFT_INFERENCE_API_KEY", raising=False)
    monkeypatch.setattr(sys, "argv", ["inference", "--base-model", "a", "--model-dir", "b", "--uploads-dir", "c"])
    assert main() == 1
    assert "needs a key in SDFT_INFERENCE_API_KEY" in capsys.readouterr().err
