"""Following a job: asks the server once a second, survives its restarts, and shows what changed.

Leaving (Ctrl-C) leaves the job running.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile

import typer
from rich.console import Console

from cli.client import Client, Json, segment
from cli.errors import ServerRefused, ServerUnreachable
from cli.output import clean
from cli.watch_screens import LiveScreen, PlainScreen, Screen

POLL_SECONDS = 1.0
UNREACHABLE_LIMIT_SECONDS = 600.0
FIRST_EVENTS = 10
ENDED = ("succeeded", "failed", "cancelled")
PASSING = (408, 429)
"""Refusals that pass by themselves, beside every status from 500 on."""

INTERRUPTED = 130


@dataclass
class Follower:
    """The last known state of one job."""

    client: Client
    job_id: str
    job: Json = field(default_factory=dict)
    last_event_id: str | None = None

    def poll(self) -> list[Json]:
        """Refresh the job. Returns the events that are new, the oldest first."""
        path = f"/fine_tuning/jobs/{segment(self.job_id)}"
        job = self.client.get(path)
        limit = FIRST_EVENTS if self.last_event_id is None else None
        newest_first = self.client.pages(f"{path}/events", limit)
        events = list(takewhile(lambda event: event["id"] != self.last_event_id, newest_first))
        if events:
            self.last_event_id = events[0]["id"]
        self.job = job  # last: a job is over only once its events are here too
        return events[::-1]


def watch(client: Client, job_id: str, *, sleep: Callable[[float], None] = time.sleep) -> int:
    """Show a job until it ends. Returns the exit status. Raises CliError where the server refuses or stays away."""
    console = Console()
    screen: Screen = LiveScreen(console) if console.is_terminal else PlainScreen(console)
    follower = Follower(client, job_id)
    try:
        with screen:
            _follow(follower, screen, sleep)
    except KeyboardInterrupt:
        typer.echo(f"\nNo longer watching; the job goes on. See it again: sdft jobs watch {job_id}; end it: sdft jobs cancel {job_id}", err=True)
        return INTERRUPTED
    return _report(follower.job)


def _follow(follower: Follower, screen: Screen, sleep: Callable[[float], None]) -> None:
    unreachable_since: float | None = None
    while follower.job.get("status") not in ENDED:
        try:
            events = follower.poll()
        except (ServerUnreachable, ServerRefused) as error:
            if not follower.job or (isinstance(error, ServerRefused) and error.status < 500 and error.status not in PASSING):
                raise
            unreachable_since = unreachable_since or time.monotonic()
            if time.monotonic() - unreachable_since > UNREACHABLE_LIMIT_SECONDS:
                raise
            screen.unreachable(str(error), time.monotonic() - unreachable_since)
        else:
            unreachable_since = None
            screen.update(follower.job, events)
        if follower.job.get("status") not in ENDED:
            sleep(POLL_SECONDS)


def _report(job: Json) -> int:
    if job["status"] == "succeeded":
        print(f"succeeded: {clean(job.get('fine_tuned_model'))}")
        return 0
    if job["status"] == "failed":
        error = job.get("error") or {}
        typer.echo(f"failed: {clean(error.get('message') or 'no reason given')} ({clean(error.get('code'))})", err=True)
    else:
        typer.echo(clean(job["status"]), err=True)
    return 1
