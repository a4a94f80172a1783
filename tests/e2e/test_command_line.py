"""The `sdft` command against the real service: upload, train and watch, chat, download."""

import hashlib
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import EXAMPLES, Service
from tests.e2e.test_main_job import BASE, QUESTION

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Sdft = Callable[..., "subprocess.CompletedProcess[str]"]
QUICK = {"n_epochs": 1, "batch_size": 6, "max_completion_tokens": 4, "temperature": 1.0, "checkpoint_every_steps": 100}


@pytest.fixture
def sdft(service: Service, tmp_path: Path) -> Sdft:
    """Runs `sdft` with these words in a temporary directory."""
    environment = os.environ | {"OPENAI_BASE_URL": str(service.client.base_url), "OPENAI_API_KEY": service.client.api_key}

    def run(*words: str, status: int = 0) -> "subprocess.CompletedProcess[str]":
        finished = subprocess.run([sys.executable, "-m", "cli.main", *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert finished.returncode == status, finished.stdout + finished.stderr
        return finished

    return run


def test_from_a_file_to_a_downloaded_adapter(service: Service, sdft: Sdft, tmp_path: Path) -> None:
    content = b"".join((EXAMPLES / "demonstrations.jsonl").read_bytes().splitlines(keepends=True)[:12])
    (tmp_path / "twelve.jsonl").write_bytes(content)
    file_id = sdft("files", "upload", "twelve.jsonl").stdout.strip()
    assert service.client.files.content(file_id).content == content

    options = [word for name, value in QUICK.items() for word in ("--hp", f"{name}={value}")]
    watched = sdft("jobs", "create", BASE, file_id, "--suffix", "cli", "--seed", "3", "--teacher-template", "history", *options, "--watch").stdout.splitlines()
    job = service.client.fine_tuning.jobs.retrieve(watched[0])
    assert (job.status, job.training_file, job.seed) == ("succeeded", file_id, 3)
    assert job.method is not None
    assert job.method.type == "sdft"
    model = str(job.fine_tuned_model)
    assert model.startswith(f"ft:{BASE}:default:cli:")
    assert watched[-1] == f"succeeded: {model}"
    assert any(line.startswith("step 2/2, loss ") for line in watched), watched
    assert any(line.endswith("The job has successfully completed") for line in watched), watched

    expected = service.client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=8).choices[0].message.content
    assert sdft("chat", model, QUESTION[0]["content"], "--temperature", "0", "--max-tokens", "8").stdout == f"{expected}\n"

    sdft("models", "download", model, "--output", "adapter.tar.gz")
    with tarfile.open(tmp_path / "adapter.tar.gz") as archive:
        assert "adapter_model.safetensors" in archive.getnames()
        weights = archive.extractfile("adapter_model.safetensors")
        assert weights is not None
        attestation = service.client.models.retrieve(model).model_extra["attestation"]
        assert hashlib.sha256(weights.read()).hexdigest() == attestation["weights_sha256"]


def test_a_refusal_of_the_real_server_is_one_line(sdft: Sdft) -> None:
    refused = sdft("chat", "no-such-model", "Hello?", status=1)
    assert refused.stdout == ""
    assert refused.stderr.startswith("error: ")
    assert "no-such-model" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
