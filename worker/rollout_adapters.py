"""The student's adapters of jobs whose rollouts an inference server samples: what a trainer that was killed left behind."""

import re
import shutil

from core.logging import get_logger
from core.served_adapters import sent_to_servers, unload_and_remove
from worker.resources import Resources

ROLLOUT_ADAPTER = re.compile(r"rollout-(ftjob-[0-9a-f]+)-")

log = get_logger(__name__)


def rollout_adapters_of(job_id: str) -> str:
    """How the names begin under which a job's student is loaded into the server that samples its rollouts."""
    return f"rollout-{job_id}-"


def job_of_rollout_adapter(name: str) -> str | None:
    """None where it is no such adapter's name."""
    found = ROLLOUT_ADAPTER.match(name)
    return found and found[1]


def forget_rollout_adapters(resources: Resources, job_id: str, attempt: int) -> None:
    """Unload those of this attempt and earlier ones where a server can be reached, and delete their files. A later attempt may be at
    work by now. Idempotent; almost always there are none."""
    root = resources.settings.served_adapters_dir
    prefix = rollout_adapters_of(job_id)
    names = {path.name for path in root.glob(f"*{prefix}*")} | {name for name in sent_to_servers(resources.inference) if name.startswith(prefix)}
    for directory in (root / name for name in names if _attempt_of(name, prefix) <= attempt):
        if directory.name.startswith("."):  # never given to a server
            shutil.rmtree(directory, ignore_errors=True)
            continue
        log.info("rollout_adapter_forgotten", name=directory.name)
        unload_and_remove(directory, resources.inference)


def _attempt_of(name: str, prefix: str) -> int:
    number = name.removeprefix(".").removeprefix(prefix).partition("-")[0]
    return int(number) if number.isdigit() else 0
