"""While a trainer runs: lines of `metrics.jsonl` and `events.jsonl` become rows, and the job's progress.

A file's offset moves only after its lines are committed, so a database that is away for a while is filled up later. An
unfinished last line waits for its end. A step that is replayed after a resume replaces its old metrics.
"""

import json
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from sqlalchemy.orm import Session

from core.jobs.events import Level, NewEvent, append_events, upsert_metrics
from core.jobs.leases import Claim, assert_held
from core.jobs.transitions import Progress, record_progress
from core.logging import get_logger
from core.storable import without_nul
from sdft_engine.contract.metrics import StepMetrics
from sdft_engine.contract.run_directory import RunDirectory
from worker.held_lease import HeldLease
from worker.run_preparation import PreparedRun

MAX_BYTES = 1 << 20
"""Read from a file at a time, so that no transaction gets long."""
RECENT_STEPS = 20

log = get_logger(__name__)


@dataclass
class LineTail:
    """Whole new lines of a file that grows, from `offset` on."""

    path: Path
    offset: int = 0

    def read(self) -> tuple[list[bytes], int]:
        """The next lines, and the offset after them."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                block = file.read(MAX_BYTES)
                while block and b"\n" not in block and (more := file.read(MAX_BYTES)):  # a line longer than a block
                    block += more
        except FileNotFoundError:
            return [], self.offset
        whole = block[: block.rfind(b"\n") + 1]
        return whole.splitlines(), self.offset + len(whole)


@dataclass(frozen=True)
class Batch:
    """What was read, and where the files go on after it. `unreadable`: how many lines were no measurement."""

    metrics: list[StepMetrics]
    events: list[NewEvent]
    unreadable: int
    metrics_offset: int
    events_offset: int


class ProgressImport:
    def __init__(self, run: RunDirectory, lease: HeldLease, prepared: PreparedRun) -> None:
        self._trained_tokens = prepared.trained_tokens
        self._lease = lease
        self._metrics = LineTail(run.metrics_path)
        self._events = LineTail(run.events_path)
        self._resolved = dict(prepared.job.resolved_hyperparameters or {})
        self._recent_seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._unreadable = 0
        self._unwritten: Batch | None = None

    def import_new(self) -> bool:
        """Import what was written since. Returns False where the database can't be reached: it may have been written all the same, so
        the same is written again. Raises LeaseLost."""
        return (self._unwritten is None or self._import(self._unwritten)) and self._import(self._read())

    def _read(self) -> Batch:
        metrics_lines, metrics_offset = self._metrics.read()
        metrics = [step for line in metrics_lines if (step := _parse_metrics(line)) is not None]
        events_lines, events_offset = self._events.read()
        events = [event for line in events_lines if (event := _parse_event(line)) is not None]
        events += [_event_of(step) for step in metrics]
        return Batch(metrics, events, len(metrics_lines) - len(metrics), metrics_offset, events_offset)

    def _import(self, batch: Batch) -> bool:
        if batch.events:
            resolved = self._resolved | _settled_by(batch.events)
            trained_tokens = self._trained_tokens + sum(step.trained_tokens for step in batch.metrics)
            progress = self._progress(batch.metrics, resolved, trained_tokens)
            self._unwritten = batch
            if not self._lease.try_write(lambda session: _write(session, self._lease.claim, batch, progress)):
                return False
            self._resolved, self._trained_tokens = resolved, trained_tokens
            self._recent_seconds.extend(step.step_seconds for step in batch.metrics)
        self._unwritten = None
        self._unreadable += batch.unreadable
        self._metrics.offset, self._events.offset = batch.metrics_offset, batch.events_offset
        return True

    def import_rest(self) -> None:
        """After the trainer ended: everything that is left, however long the database stays away, and how much of it was no
        measurement. Raises LeaseLost."""
        while True:
            before = (self._metrics.offset, self._events.offset)
            if not self.import_new():
                time.sleep(0.5)
            elif before == (self._metrics.offset, self._events.offset):
                break
        if self._unreadable:
            message = f"The trainer wrote measurements that can't be read and are left out: {self._unreadable}"
            self._lease.warn(message, {"unreadable_lines": self._unreadable})

    def _progress(self, metrics: list[StepMetrics], resolved: dict[str, Any], trained_tokens: int) -> Progress | None:
        """What the new lines change in the job's row; None: nothing."""
        changed = Progress(resolved_hyperparameters=resolved) if resolved != self._resolved else None
        if not metrics:
            return changed
        last = metrics[-1]
        recent = [*self._recent_seconds, *(step.step_seconds for step in metrics)][-RECENT_STEPS:]
        return replace(
            changed or Progress(),
            phase="training",
            step=last.step,
            total_steps=last.total_steps,
            trained_tokens=trained_tokens,
            estimated_finish_at=time.time() + (last.total_steps - last.step) * sum(recent) / len(recent),
        )


def _write(session: Session, claim: Claim, batch: Batch, progress: Progress | None) -> None:
    """The fence comes first: it locks the row for what follows."""
    if progress is None:
        assert_held(session, claim)
    else:
        record_progress(session, claim, progress)
    upsert_metrics(session, claim.job_id, claim.attempt, {step.step: step.model_dump() for step in batch.metrics})
    append_events(session, claim.job_id, batch.events)


def _event_of(step: StepMetrics) -> NewEvent:
    message = f"Step {step.step}/{step.total_steps}: training loss={step.train_loss:.4f}"
    return NewEvent(message, type="metrics", data=step.model_dump(exclude_none=True))


def _settled_by(events: list[NewEvent]) -> dict[str, Any]:
    """Hyperparameters that were "auto" until the trainer said so."""
    settled: dict[str, Any] = {}
    for event in events:
        if event.data and isinstance(event.data.get("resolved"), dict):
            settled |= event.data["resolved"]
    return settled


def _parse_metrics(line: bytes) -> StepMetrics | None:
    try:
        return StepMetrics.model_validate_json(line)
    except ValidationError as error:
        log.error("metrics_line_unreadable", line=line[:200].decode(errors="replace"), error=str(error))
        return None


def _parse_event(line: bytes) -> NewEvent | None:
    try:
        value = without_nul(json.loads(line))
        level: Level = value["level"] if value.get("level") in ("warn", "error") else "info"
        data = value.get("data")
        return NewEvent(str(value["message"]), level, data=data if isinstance(data, dict) else None)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        log.error("event_line_unreadable", line=line[:200].decode(errors="replace"), error=repr(error))
        return None
