"""A worker tells the database that it is there, and that it leaves."""

import threading
import time

import pytest

from core.workers import workers_that_are_there
from tests.worker.conftest import Workshop
from worker import presence
from worker.polling import Poll
from worker.presence import Presence


def there(workshop: Workshop) -> list[tuple[int, list[list[str]]]]:
    with workshop.database.reading() as session:
        return [(worker.slots, worker.devices) for worker in workers_that_are_there(session)]


def test_it_is_told_with_the_devices_and_not_too_often(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    tell = presence.tell_presence
    monkeypatch.setattr(presence, "tell_presence", lambda session, *arguments: (told.append(arguments[0]), tell(session, *arguments)))
    own = Presence(workshop.resources)
    for _ in range(5):
        own.tell()
    assert told == [own.worker_id]
    assert there(workshop) == [(1, [[]])]
    own.leave()
    assert there(workshop) == []


def test_the_poll_tells_and_leaves_at_its_end(workshop: Workshop) -> None:
    thread = threading.Thread(target=Poll(workshop.resources).run)
    thread.start()
    until = time.monotonic() + 10
    while not there(workshop):
        assert time.monotonic() < until
        time.sleep(0.05)
    workshop.resources.stopping.set()
    thread.join(10)
    assert there(workshop) == []
