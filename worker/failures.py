"""From an exception to the `error` object of a job. Used at the boundary around each job, where all of them arrive."""

from typing import Any

from core.durable_files import is_disk_full
from core.errors import StorageFull
from core.logging import get_logger
from core.storage import ObjectDamaged
from sdft_engine.contract.dataset import DatasetProblem, summarise_problems
from sdft_engine.contract.errors import DiskFull, EngineError

log = get_logger(__name__)


class JobRejected(Exception):
    """The job can't run as its user asked. `problems` are lines of a file, the first hundred of `problem_count`."""

    def __init__(self, message: str, *, code: str, param: str | None, problems: list[DatasetProblem] | None = None) -> None:
        super().__init__(message)
        self.error: dict[str, Any] = {"code": code, "message": message, "param": param}
        if problems:
            self.error["problems"] = [{"line": problem.line, "code": problem.code, "message": problem.message} for problem in problems]


def rows_rejected(problems: list[DatasetProblem], problem_count: int, *, param: str) -> JobRejected:
    """The code is that of the first problem, as at an upload."""
    return JobRejected(summarise_problems(problems, problem_count), code=problems[0].code, param=param, problems=problems)


def describe_failure(error: Exception) -> dict[str, Any]:
    """The job's {code, message, param}. What nobody foresaw goes to the log with its traceback, not to the user."""
    if isinstance(error, JobRejected):
        return error.error
    if isinstance(error, EngineError):
        return error.as_dict()
    if isinstance(error, StorageFull) or is_disk_full(error):
        return DiskFull("the worker's disk is full; free space and create the job again").as_dict()
    if isinstance(error, ObjectDamaged):
        return {"code": "storage_damaged", "message": f"a stored object is damaged: {error}", "param": None}
    log.error("job_failed_unexpectedly", exc_info=error)
    return {"code": "server_error", "message": f"the worker met an internal error ({type(error).__name__}); see its log", "param": None}
