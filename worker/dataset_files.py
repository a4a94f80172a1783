"""Uploaded files as lines, read from storage while they are used: a file may be larger than memory should hold."""

from collections.abc import Callable, Iterable, Iterator

from core.settings import Settings
from core.storage import Storage, verified
from core.tables.files import File
from core.tables.jobs import Job
from sdft_engine.contract.dataset import DatasetLimits
from sdft_engine.contract.hyperparameters import SdftHyperparameters, SupervisedHyperparameters
from sdft_engine.contract.probes import parse_probes
from sdft_engine.contract.teacher_prompts import TeacherView
from worker.base_models import PreparedBaseModel
from worker.failures import JobRejected, rows_rejected
from worker.row_lengths import FittingRows, MeasuredFile, fit, measure


def limits_of(settings: Settings) -> DatasetLimits:
    return DatasetLimits(max_line_bytes=settings.max_line_bytes, max_lines=settings.max_lines)


def read_lines(storage: Storage, file: File | None, param: str) -> Iterator[bytes]:
    """The file's lines without their newlines. Raises JobRejected where row or bytes are gone, and ObjectDamaged before the last
    chunk's lines where they are not those that were uploaded."""
    try:
        if file is None:
            raise FileNotFoundError
        chunks = verified(storage.read(file.storage_key), file.storage_key, file.sha256)
    except FileNotFoundError as error:
        raise JobRejected(f"the {param.rpartition('.')[2].replace('_', ' ')} does not exist any more", code="file_not_found", param=param) from error
    return _lines_of(chunks)


def _lines_of(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest: list[bytes] = []  # a long line spans many chunks: joined once
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        rest.append(first)
        if others:
            yield b"".join(rest)
            yield from others[:-1]
            rest = [others[-1]]
    if last := b"".join(rest):
        yield last


def wire_hyperparameters(job: Job) -> SdftHyperparameters | SupervisedHyperparameters:
    """The job's hyperparameters as its user gave them, "auto" included."""
    given = method_section(job).get("hyperparameters") or {}
    return SdftHyperparameters.model_validate(given) if job.method["type"] == "sdft" else SupervisedHyperparameters.model_validate(given)


def method_section(job: Job) -> dict[str, object]:
    section: dict[str, object] = job.method.get(job.method["type"]) or {}
    return section


def teacher_view(job: Job) -> TeacherView:
    section = method_section(job)
    return TeacherView(str(section.get("teacher_template") or "example"), bool(section.get("reasoning")))


def measured_training_rows(
    job: Job, lines: Iterable[bytes], settings: Settings, base_model: PreparedBaseModel, check: Callable[[], None]
) -> tuple[MeasuredFile, FittingRows]:
    """Every row's length, and which rows fit. The same job and file always give the same rows."""
    wire = wire_hyperparameters(job)
    is_sdft = isinstance(wire, SdftHyperparameters)
    measured = measure(lines, limits_of(settings), base_model.chat_format, teacher_view(job) if is_sdft else None, check)
    fitting = fit(measured, wire.max_completion_tokens if isinstance(wire, SdftHyperparameters) else None, base_model.chat_format.context_length)
    return measured, fitting


def measured_validation_rows(
    lines: Iterable[bytes], settings: Settings, base_model: PreparedBaseModel, check: Callable[[], None]
) -> tuple[MeasuredFile, FittingRows]:
    """Validation scores demonstrations after their prompts: no teacher, no rollout."""
    measured = measure(lines, limits_of(settings), base_model.chat_format, None, check)
    return measured, fit(measured, None, base_model.chat_format.context_length)


def retention_file_id(job: Job) -> str | None:
    file_id = method_section(job).get("retention_file")
    return str(file_id) if file_id else None


def check_retention_questions(lines: Iterable[bytes], base_model: PreparedBaseModel) -> None:
    """Raise DatasetError naming the first line that is no question, or is too long for the context."""
    chat_format = base_model.chat_format
    parse_probes(lines, "the retention file", chat_format.question_length, chat_format.context_length)


def require_usable(measured: MeasuredFile, param: str) -> None:
    """Raise JobRejected naming the lines that can't be read as demonstrations."""
    if measured.reader.problem_count:
        raise rows_rejected(measured.reader.problems, measured.reader.problem_count, param=param)
