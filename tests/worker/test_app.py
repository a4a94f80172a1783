"""The Celery application: what it listens to, how many threads it wants, and that it is light."""

import json
import subprocess
import sys
from pathlib import Path

SETTINGS = {
    "task_ignore_result": True,
    "result_backend": None,
    "task_serializer": "json",
    "accept_content": ["json"],
    "task_acks_late": False,
    "worker_prefetch_multiplier": 1,
    "worker_disable_prefetch": True,
    "worker_cancel_long_running_tasks_on_connection_loss": False,
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
}
"""Without any of these, a job would be run from a message instead of its row, be given back while it runs, or the worker would give up."""
PROGRAM = (
    f"NAMES = {list(SETTINGS)}"
    + """
import json, sys
from worker.app import app
heavy = sorted({"torch", "transformers", "peft", "numpy", "safetensors"} & sys.modules.keys())
print(json.dumps({"heavy": heavy, "tasks": sorted(name for name in app.tasks if not name.startswith("celery.")),
                  "threads": app.conf.worker_concurrency, "pool": app.conf.worker_pool,
                  "settings": {name: app.conf[name] for name in NAMES}}))
"""
)


def test_a_worker_without_the_devices_it_needs_ends_with_a_message(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "SDFT_DATA_DIR": str(tmp_path / "data"), "SDFT_DEVICES": "0", "SDFT_DEVICES_PER_JOB": "2"}
    run = subprocess.run([sys.executable, "-c", "import worker.app"], env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == "The worker can't start: SDFT_DEVICES_PER_JOB is 2, and this worker has 1: 0\n"


def test_the_worker_is_light_and_knows_one_task(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "SDFT_DATA_DIR": str(tmp_path / "data"), "SDFT_TRAINING_SLOTS": "3"}
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, cwd=root, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == {
        "heavy": [],
        "tasks": ["worker.look_for_work"],
        "threads": 5,
        "pool": "threads",
        "settings": SETTINGS,
    }
    assert not (tmp_path / "data").exists(), "importing the application makes nothing"
