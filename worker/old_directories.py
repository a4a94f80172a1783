"""Directories that nobody needs any more: of runs, of exports, and of unpacked adapters, on this machine or sent to an inference server.

Workers may share them. What is there is listed before the database is asked whose it is, because a row is older than its directory;
where it is not, only a directory that has not been touched for a day goes.
"""

import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from sqlalchemy import select

from core.database import unix_now
from core.model_exports import tokens_of_running_exports
from core.served_adapters import sent_to_servers, unload_and_remove
from core.tables.jobs import TERMINAL_STATUSES, Job
from core.tables.models import Model
from worker.resources import Resources
from worker.rollout_adapters import forget_rollout_adapters, job_of_rollout_adapter

ABANDONED_SECONDS = 86_400.0


def remove_old_runs(resources: Resources) -> int:
    """Run directories of jobs that ended long enough ago, and of jobs that there are not."""
    there = _directories_in(resources.settings.runs_dir)
    with resources.database.reading() as session:
        rows = session.execute(select(Job.id, Job.status, Job.finished_at).where(Job.id.in_([path.name for path in there])))
        jobs = {row.id: row for row in rows}
    before = unix_now() - resources.settings.keep_runs_seconds

    def is_old(path: Path) -> bool:
        job = jobs.get(path.name)
        if job is None:
            return _is_abandoned(path)
        return job.status in TERMINAL_STATUSES and job.finished_at is not None and job.finished_at < before

    return _remove(path for path in there if is_old(path))


def remove_export_directories(resources: Resources) -> int:
    """Of exports whose worker was killed."""
    there = _directories_in(resources.settings.exports_dir)
    with resources.database.reading() as session:
        in_use = tokens_of_running_exports(session)
    return _remove(path for path in there if path.name not in in_use)


def remove_unserved_adapters(resources: Resources) -> int:
    """Unpacked adapters of models that were deleted or never came to be, and what was never unpacked whole."""
    there = [path for path in _adapters_there(resources) if job_of_rollout_adapter(path.name) is None]
    with resources.database.reading() as session:
        rows = session.execute(select(Model.serving_name, Model.status).where(Model.serving_name.in_([path.name for path in there])))
        status_of = {row.serving_name: row.status for row in rows}
    unserved = [path for path in there if status_of.get(path.name) == "deleted" or (path.name not in status_of and _is_abandoned(path))]
    for path in unserved:
        if not path.name.startswith("."):  # never given to a server
            unload_and_remove(path, resources.inference)
    return _remove(unserved)


def remove_idle_rollout_adapters(resources: Resources) -> int:
    """The student's adapters of jobs that don't run, where the worker that would have removed them was killed."""
    there = {path: job_id for path in _adapters_there(resources) if (job_id := job_of_rollout_adapter(path.name))}
    with resources.database.reading() as session:
        jobs = {row.id: row for row in session.execute(select(Job.id, Job.status, Job.attempt).where(Job.id.in_(there.values())))}
    forgotten = set()
    for job_id in set(there.values()):
        job = jobs.get(job_id)
        if job is not None and job.status != "running":
            forget_rollout_adapters(resources, job_id, job.attempt)
            forgotten.add(job_id)
        elif job is None and all(_is_abandoned(path) for path, of_job in there.items() if of_job == job_id):
            forget_rollout_adapters(resources, job_id, sys.maxsize)
            forgotten.add(job_id)
    return sum(job_id in forgotten and not path.exists() for path, job_id in there.items())


def _adapters_there(resources: Resources) -> set[Path]:
    """Also those that lie on an inference server alone, as they would be called here. Of another service that has adapters there we
    know no rows, and they are left alone: no such directory here was abandoned."""
    root = resources.settings.served_adapters_dir
    return {*_directories_in(root), *(root / name for name in sent_to_servers(resources.inference))}


def _directories_in(root: Path) -> list[Path]:
    return list(root.iterdir()) if root.exists() else []


def _is_abandoned(path: Path) -> bool:
    try:
        return path.stat().st_mtime < time.time() - ABANDONED_SECONDS
    except FileNotFoundError:  # another worker was faster
        return False


def _remove(paths: Iterable[Path]) -> int:
    """Files too: archives that were being unpacked."""
    removed = 0
    for path in paths:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        removed += not path.exists()
    return removed
