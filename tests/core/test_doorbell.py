import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from core.doorbell import LOOK_FOR_WORK, MOST_PENDING, Doorbell, broker_answers, celery_application, failed_rings, publish
from core.settings import Settings

MakeSettings = Callable[..., Settings]


@pytest.fixture
def client(valkey: str) -> Iterator[redis.Redis]:
    with redis.Redis(unix_socket_path=valkey.removeprefix("redis+socket://")) as client:
        client.flushall()
        yield client
        client.config_set("maxmemory", 0)
        client.flushall()


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def test_message_says_only_look_for_work(make_settings: MakeSettings, valkey: str, client: redis.Redis) -> None:
    assert publish(celery_application(make_settings(redis_url=valkey)))
    waiting: Any = client.lrange("celery", 0, -1)
    assert len(waiting) == 1
    message = json.loads(waiting[0])
    assert message["headers"]["task"] == LOOK_FOR_WORK
    assert json.loads(base64.b64decode(message["body"]))[:2] == [[], {}]


def test_ringing_from_many_threads_loses_no_message(make_settings: MakeSettings, valkey: str, client: redis.Redis) -> None:
    doorbell = Doorbell(celery_application(make_settings(redis_url=valkey)))
    threads = [threading.Thread(target=doorbell.ring) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_for(lambda: client.llen("celery") == 20)
    doorbell.close()


def test_a_broker_that_hangs_holds_up_nobody_who_rings_nor_the_end(make_settings: MakeSettings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        doorbell = Doorbell(celery_application(make_settings(redis_url=f"redis://127.0.0.1:{silent.getsockname()[1]}/0")))
        started = time.monotonic()
        for _ in range(MOST_PENDING + 10):
            doorbell.ring()
        assert [thread.name for thread in threading.enumerate()].count("doorbell") == 1
        doorbell.close()
        assert time.monotonic() - started < 10


def test_rings_that_fail_are_given_up_and_later_ones_arrive(make_settings: MakeSettings, valkey: str, client: redis.Redis) -> None:
    app = celery_application(make_settings(redis_url=valkey))
    doorbell = Doorbell(app)
    client.config_set("maxmemory", 1)
    before = failed_rings._value.get()
    for _ in range(50):
        doorbell.ring()
    wait_for(lambda: "doorbell" not in [thread.name for thread in threading.enumerate()])
    assert 1 <= failed_rings._value.get() - before <= 50
    client.config_set("maxmemory", 0)
    assert client.llen("celery") == 0
    doorbell.ring()
    wait_for(lambda: client.llen("celery") == 1)


def test_an_unforeseen_error_ends_no_later_ring(make_settings: MakeSettings, valkey: str, client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    doorbell = Doorbell(celery_application(make_settings(redis_url=valkey)))

    def broken(app: object) -> bool:
        raise ValueError("unforeseen")

    monkeypatch.setattr("core.doorbell.publish", broken)
    doorbell.ring()
    wait_for(lambda: "doorbell" not in [thread.name for thread in threading.enumerate()])
    monkeypatch.undo()
    doorbell.ring()
    wait_for(lambda: client.llen("celery") == 1)


@pytest.mark.parametrize("url", ["redis+socket:///nonexistent/valkey.sock", "redis://127.0.0.1:1/0"])
def test_broker_that_is_down_is_told_quickly_and_is_no_error(make_settings: MakeSettings, url: str) -> None:
    app = celery_application(make_settings(redis_url=url))
    before = failed_rings._value.get()
    started = time.monotonic()
    assert publish(app) is False
    assert time.monotonic() - started < 3
    assert failed_rings._value.get() == before + 1


def test_broker_without_memory_is_no_error(make_settings: MakeSettings, valkey: str, client: redis.Redis) -> None:
    app = celery_application(make_settings(redis_url=valkey))
    assert publish(app)
    client.config_set("maxmemory", 1)
    assert publish(app) is False
    client.config_set("maxmemory", 0)
    assert publish(app)


def test_ringing_works_again_when_the_broker_is_back(make_settings: MakeSettings, valkey: str, client: redis.Redis) -> None:
    app = celery_application(make_settings(redis_url=valkey))
    assert publish(app)
    client.client_kill_filter(_type="normal", skipme=True)  # as a restart does: every connection breaks
    assert publish(app)
    assert client.llen("celery") == 2


def test_broker_answers(valkey: str) -> None:
    assert broker_answers(valkey)
    assert not broker_answers("redis+socket:///nonexistent/valkey.sock")


def test_a_broker_that_hangs_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        assert not broker_answers(f"redis://127.0.0.1:{silent.getsockname()[1]}/0", timeout_seconds=0.2)
    assert time.monotonic() - started < 2
