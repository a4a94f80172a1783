"""Faults of a run itself: a full disk, damaged checkpoints, too little memory, numbers that are none."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sqlalchemy import select
from torch import Tensor

from core.tables.jobs import Checkpoint
from tests.faults.conftest import on_postgres, on_sqlite
from tests.faults.deployment import Deployment, wait_for

WIDE = 32_768

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def mount_small_disk() -> Iterator[Callable[[Path, int], None]]:
    """Mounts a disk of so many KiB on a directory."""
    mounted: list[Path] = []

    def mount(directory: Path, kib: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(directory)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted.append(directory)

    yield mount
    for directory in mounted:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(directory: Path, leave_bytes: int) -> Path:
    """Take what is free but for so many bytes."""
    path = directory / "filler"
    path.write_bytes(b"x" * max(0, shutil.disk_usage(directory).free - leave_bytes))
    return path


@on_sqlite
def test_14_a_disk_that_is_full_at_a_checkpoint_fails_the_job_and_spares_what_was_stored(
    database_url: str, mount_small_disk: Callable[[Path, int], None], make_deployment: Callable[..., Deployment]
) -> None:
    deployment = make_deployment(database_url)
    mount_small_disk(deployment.settings.runs_dir, 20_000)
    deployment.start("valkey", "inference", "api", "worker")
    job_id = deployment.create_job()
    deployment.wait_for_checkpoint(job_id)
    filler = fill(deployment.settings.runs_dir, 20_000)
    job = deployment.wait_for_end(job_id, "failed")
    assert job.error is not None
    assert job.error["code"] == "disk_full"
    with deployment.database.reading() as session:
        stored = session.scalars(select(Checkpoint).where(Checkpoint.job_id == job_id)).all()
    assert [checkpoint.step for checkpoint in stored][:1] == [25]
    filler.unlink()
    deployment.wait_for_end(deployment.create_job(n_epochs=2))


@on_postgres
def test_14_a_disk_that_is_full_at_an_upload_is_told_and_spares_what_was_stored(
    database_url: str, mount_small_disk: Callable[[Path, int], None], make_deployment: Callable[..., Deployment]
) -> None:
    deployment = make_deployment(database_url, SDFT_MIN_FREE_BYTES="0")
    mount_small_disk(deployment.settings.storage_dir, 4_000)
    deployment.start("valkey", "api")
    kept = deployment.upload()
    line = b'{"prompt": "Which lamp?", "completion": "The red one."}\n'
    with pytest.raises(Exception, match="storage is full") as refused:
        deployment.client.files.create(file=("big.jsonl", line * 200_000), purpose="fine-tune")
    assert getattr(refused.value, "status_code", None) == 507
    assert [file.id for file in deployment.client.files.list()] == [kept]
    assert len(deployment.client.files.content(kept).read()) > 0
    deployment.upload()


@on_postgres
@pytest.mark.parametrize("damage", ["truncated", "one_bit"])
def test_15_a_damaged_checkpoint_is_passed_over(deployment: Deployment, damage: str) -> None:
    file_id = deployment.upload()
    job_id = deployment.create_job(file_id)
    deployment.wait_for_step(job_id, 60)
    deployment.signal("worker", 15)
    deployment.ended("worker")
    with deployment.database.reading() as session:
        checkpoints = session.scalars(select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step)).all()
    path = deployment.settings.storage_dir / checkpoints[-1].storage_key
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)
    deployment.start("worker2")
    deployment.wait_for_end(job_id)
    told = f"The checkpoint of step {checkpoints[-1].step} is damaged or gone; the one of step {checkpoints[-2].step} is tried"
    assert told in deployment.messages(job_id)
    assert any(f"resumed at step {checkpoints[-2].step}" in message for message in deployment.messages(job_id))
    assert deployment.losses(job_id) == deployment.undisturbed_losses(file_id)


@on_sqlite
def test_17_numbers_that_are_none_fail_the_job_once_and_say_what_to_change(deployment: Deployment, tmp_path: Path) -> None:
    """A base model with one weight that is no number."""
    with another_base(deployment, tmp_path) as (weights, _):
        name = next(name for name in weights if name.endswith("mlp.down_proj.weight"))
        weights[name][0, 0] = float("nan")
    error = failed_once(deployment)
    assert error["code"] == "numerical_error"
    assert "learning_rate" in error["message"]


@on_sqlite
def test_17_too_little_memory_fails_the_job_once_and_says_what_to_change(database_url: str, make_deployment: Callable[..., Deployment], tmp_path: Path) -> None:
    """The trainer may have as much memory as it holds with the model loaded, and 2 GiB. Its layers are so wide that one tensor
    of a step is larger: whatever else needs memory, kernels that oneDNN compiles among it, has enough."""
    deployment = make_deployment(database_url, SDFT_TOKENS_PER_PASS="65536")
    with another_base(deployment, tmp_path) as (weights, configuration):
        for name in [name for name in weights if ".mlp." in name]:
            outputs, inputs = weights[name].shape
            weights[name] = torch.randn(outputs, WIDE) / WIDE if "down_proj" in name else torch.randn(WIDE, inputs)
        configuration["intermediate_size"] = WIDE
    deployment.start("valkey", "inference", "api")
    deployment.start("worker", application="tests.fixtures.worker_with_little_memory", PYTHONPATH=str(Path(__file__).parents[2]))
    error = failed_once(deployment, batch_size=256, max_completion_tokens=300)
    assert error["code"] == "out_of_memory"
    assert "lower batch_size" in error["message"]


@contextmanager
def another_base(deployment: Deployment, tmp_path: Path) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Puts a base model with other weights and another configuration in the place of the deployment's."""
    prepared = deployment.settings.base_models[0].directory(deployment.settings.cache_dir)
    changed = tmp_path / "changed"
    shutil.copytree(prepared, changed)
    weights = load_file(changed / "model.safetensors")
    configuration = json.loads((changed / "config.json").read_text())
    yield weights, configuration
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    (changed / "config.json").write_text(json.dumps(configuration))
    prepared.unlink()
    prepared.symlink_to(changed)


def failed_once(deployment: Deployment, **hyperparameters: Any) -> dict[str, Any]:
    job_id = deployment.create_job(**hyperparameters)
    wait_for(lambda: deployment.job(job_id).finished_at is not None, 120, lambda: deployment.story(job_id))
    job = deployment.job(job_id)
    assert (job.status, job.attempt) == ("failed", 1), deployment.story(job_id)
    assert job.error is not None
    return job.error
