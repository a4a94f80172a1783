"""The real worker with a trainer that trains nothing: `celery -A benchmarks.load_parts.scripted_worker worker`."""

import sys
from pathlib import Path

from worker import resources

resources.TRAINER_COMMAND = (sys.executable, str(Path(__file__).with_name("scripted_trainer.py")))

from worker.app import app  # noqa: E402, F401
