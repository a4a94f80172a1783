"""How a followed job is shown: a live display on a terminal, plain lines anywhere else."""

import time
from collections import deque
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cli.client import Json
from cli.output import clean, duration, local_time

SHOWN_EVENTS = 6
BAR_WIDTH = 40
PLAIN_PROGRESS_SECONDS = 10.0
LEVEL_STYLES = {"warn": "yellow", "error": "red"}


class Screen(Protocol):
    def __enter__(self) -> object: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None: ...

    def update(self, job: Json, events: list[Json]) -> None:
        """A fresh job object, and the events since the last one, the oldest first."""
        ...

    def unreachable(self, reason: str, seconds: float) -> None:
        """The server hasn't answered for `seconds`; it is asked again."""
        ...


def loss_in(events: list[Json]) -> float | None:
    """The latest training loss that these events carry."""
    losses = [event["data"]["train_loss"] for event in events if isinstance(event.get("data"), dict) and "train_loss" in event["data"]]
    return float(losses[-1]) if losses and losses[-1] is not None else None


def status_text(job: Json) -> str:
    """Status with what there is to know about it: the place in the queue, or the phase."""
    status = clean(job["status"])
    if job.get("queue_position") is not None:
        return f"{status}, place {job['queue_position']} in the queue"
    phase = (job.get("progress") or {}).get("phase")
    return f"{status}, {clean(phase)}" if phase else status


def progress_text(job: Json, loss: float | None) -> str | None:
    """Step, time left and loss; None before training starts."""
    progress = job.get("progress") or {}
    if not progress.get("total_steps"):
        return None
    words = [f"step {progress.get('step') or 0}/{progress['total_steps']}"]
    words += [f"loss {loss:.4f}"] if loss is not None else []
    left_seconds = (job.get("estimated_finish") or 0) - time.time()
    if job["status"] == "running" and left_seconds >= 1:
        words.append(f"about {duration(left_seconds)} left")
    return ", ".join(words)


class PlainScreen:
    """One line for each event and each change of status; progress at most every ten seconds, and at the last step."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: str | None = None
        self._progress: str | None = None
        self._progress_at = float("-inf")
        self._loss: float | None = None
        self._away = False

    def __enter__(self) -> "PlainScreen":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        return None

    def update(self, job: Json, events: list[Json]) -> None:
        if self._away:
            self._print("the server answers again")
            self._away = False
        self._loss = loss_in(events) if loss_in(events) is not None else self._loss
        for event in events:
            if event.get("type") != "metrics":
                self._print(f"{local_time(event['created_at'])}  {clean(event['message'])}")
        if status_text(job) != self._status:
            self._status = status_text(job)
            self._print(f"status: {self._status}")
        self._show_progress(job)

    def unreachable(self, reason: str, seconds: float) -> None:
        if not self._away:
            self._print(f"no answer, still trying: {clean(reason)}")
            self._away = True

    def _show_progress(self, job: Json) -> None:
        progress = job.get("progress") or {}
        step = f"{progress.get('step')}/{progress.get('total_steps')}"
        finished = progress.get("step") == progress.get("total_steps")
        text = progress_text(job, self._loss)
        if text is None or step == self._progress or (time.monotonic() - self._progress_at < PLAIN_PROGRESS_SECONDS and not finished):
            return
        self._progress, self._progress_at = step, time.monotonic()
        self._print(text)

    def _print(self, line: str) -> None:
        print(line, flush=True)


class LiveScreen:
    """Status, a progress bar and the last events, redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, refresh_per_second=4)
        self._events: deque[Json] = deque(maxlen=SHOWN_EVENTS)
        self._job: Json = {}
        self._loss: float | None = None

    def __enter__(self) -> "LiveScreen":
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._live.stop()

    def update(self, job: Json, events: list[Json]) -> None:
        self._job = job
        self._loss = loss_in(events) if loss_in(events) is not None else self._loss
        self._events.extend(event for event in events if event.get("type") != "metrics")
        self._live.update(self._draw())

    def unreachable(self, reason: str, seconds: float) -> None:
        notice = Text(f"no answer for {duration(seconds)}, still trying: {clean(reason)}", style="yellow")
        self._live.update(Group(self._draw(), notice) if self._job else notice)

    def _draw(self) -> RenderableType:
        job = self._job
        lines: list[RenderableType] = [Text.assemble((clean(job["id"]), "bold"), f"  {clean(job['model'])}  ", (status_text(job), "cyan"))]
        text = progress_text(job, self._loss)
        if text is not None:
            row = Table.grid(padding=(0, 2))
            row.add_row(ProgressBar(total=job["progress"]["total_steps"], completed=job["progress"].get("step") or 0, width=BAR_WIDTH), Text(text))
            lines.append(row)
        for event in self._events:
            style = LEVEL_STYLES.get(event.get("level", ""), "")
            lines.append(Text.assemble((local_time(event["created_at"]), "dim"), "  ", (clean(event["message"]), style)))
        return Group(*lines)
