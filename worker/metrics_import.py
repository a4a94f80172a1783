"""While a trainer runs: lines of `metrics.jsonl` and `events.jsonl` become rows, and the job's progress.

A file's offset moves only after its lines are committed, so a database that is away for a while is filled up later. An
unfinished last line waits for its end. A step that is replayed after a resume replaces its old metrics.
"""

import json
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from sqlalchemy.orm import Session

from core.jobs.events import Level, append_event, upsert_metrics
from core.jobs.transitions import Claim, record_progress
from core.logging import get_logger
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
class TrainerEvent:
    message: str
    level: Level
    data: dict[str, Any] | None


class ProgressImport:
    def __init__(self, run: RunDirectory, lease: HeldLease, prepared: PreparedRun) -> None:
        self.trained_tokens = prepared.trained_tokens
        self._lease = lease
        self._metrics = LineTail(run.metrics_path)
        self._events = LineTail(run.events_path)
        self._resolved = dict(prepared.job.resolved_hyperparameters or {})
        self._recent_seconds: deque[float] = deque(maxlen=RECENT_STEPS)

    def import_new(self) -> bool:
        """Import what was written since. Returns False where the database can't be reached. Raises LeaseLost."""
        metrics_lines, metrics_offset = self._metrics.read()
        metrics = [step for line in metrics_lines if (step := _parse_metrics(line)) is not None]
        events_lines, events_offset = self._events.read()
        events = [event for line in events_lines if (event := _parse_event(line)) is not None]
        if metrics or events:
            progress = self._progress(metrics, events)
            if not self._lease.try_write(lambda session: _write(session, self._lease.claim, metrics, events, progress)):
                return False
            self.trained_tokens = progress.get("trained_tokens", self.trained_tokens)
            self._resolved = progress.get("resolved_hyperparameters", self._resolved)
            self._recent_seconds.extend(step.step_seconds for step in metrics)
        self._metrics.offset, self._events.offset = metrics_offset, events_offset
        return True

    def import_rest(self) -> None:
        """After the trainer ended: everything that is left, however long the database stays away. Raises LeaseLost."""
        while True:
            before = (self._metrics.offset, self._events.offset)
            if not self.import_new():
                time.sleep(0.5)
            elif before == (self._metrics.offset, self._events.offset):
                return

    def _progress(self, metrics: list[StepMetrics], events: list[TrainerEvent]) -> dict[str, Any]:
        progress: dict[str, Any] = {}
        settled = [event.data["resolved"] for event in events if event.data and isinstance(event.data.get("resolved"), dict)]
        if settled:
            progress["resolved_hyperparameters"] = self._resolved.copy()
            for values in settled:
                progress["resolved_hyperparameters"] |= values
        if metrics:
            last = metrics[-1]
            recent = [*self._recent_seconds, *(step.step_seconds for step in metrics)][-RECENT_STEPS:]
            progress |= {
                "step": last.step,
                "total_steps": last.total_steps,
                "phase": "training",
                "trained_tokens": self.trained_tokens + sum(step.trained_tokens for step in metrics),
                "estimated_finish_at": time.time() + (last.total_steps - last.step) * sum(recent) / len(recent),
            }
        return progress


def _write(session: Session, claim: Claim, metrics: list[StepMetrics], events: list[TrainerEvent], progress: dict[str, Any]) -> None:
    """`record_progress` comes first: it is the fence, and locks the row for what follows."""
    record_progress(session, claim, **(progress or {"lease_token": claim.lease_token}))
    for event in events:
        append_event(session, claim.job_id, event.message, level=event.level, data=event.data)
    for step in metrics:
        upsert_metrics(session, claim.job_id, step.step, claim.attempt, step.model_dump())
        message = f"Step {step.step}/{step.total_steps}: training loss={step.train_loss:.4f}"
        append_event(session, claim.job_id, message, type="metrics", data=step.model_dump(exclude_none=True))


def _parse_metrics(line: bytes) -> StepMetrics | None:
    try:
        return StepMetrics.model_validate_json(line)
    except ValidationError as error:
        log.error("metrics_line_unreadable", line=line[:200].decode(errors="replace"), error=str(error))
        return None


def _parse_event(line: bytes) -> TrainerEvent | None:
    try:
        value = json.loads(line)
        level: Level = value["level"] if value.get("level") in ("warn", "error") else "info"
        data = value.get("data")
        return TrainerEvent(str(value["message"]), level, data if isinstance(data, dict) else None)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        log.error("event_line_unreadable", line=line[:200].decode(errors="replace"), error=repr(error))
        return None
