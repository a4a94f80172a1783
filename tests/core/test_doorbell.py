import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from core.doorbell import LOOK_FOR_WORK, broker_answers, celery_application, failed_rings, ring
from core.settings import Settings

MakeSettings = Callable[..., Settings]


@pytest.fixture
def client(valkey: str) -> Iterator[redis.Redis]:
    with redis.Redis(unix_socket_path=valkey.removeprefix("redis+socket://")) as client:
        client.flushall()
        yield client
        client.config_set("maxmemory", 0)
        client.flushall()


def test_message_says_only_look_for_work(make_settings: MakeSettings, valkey: str, client: redis.Redis) -> None:
    assert ring(celery_application(make_settings(redis_url=valkey)))
    waiting: Any = client.lrange("celery", 0, -1)
    assert len(waiting) == 1
    message = json.loads(waiting[0])
    assert message["headers"]["task"] == LOOK_FOR_WORK
    assert json.loads(base64.b64decode(message["body"]))[:2] == [[], {}]


def test_ringing_from_many_threads_loses_no_message(make_settings: MakeSettings, valkey: str, client: redis.Redis) -> None:
    app = celery_application(make_settings(redis_url=valkey))
    threads = [threading.Thread(target=ring, args=(app,)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert client.llen("celery") == 20


@pytest.mark.parametrize("url", ["redis+socket:///nonexistent/valkey.sock", "redis://127.0.0.1:1/0"])
def test_broker_that_is_down_is_told_quickly_and_is_no_error(make_settings: MakeSettings, url: str) -> None:
    app = celery_application(make_settings(redis_url=url))
    before = failed_rings._value.get()
    started = time.monotonic()
    assert ring(app) is False
    assert time.monotonic() - started < 3
    assert failed_rings._value.get() == before + 1


def test_broker_without_memory_is_no_error(make_settings: MakeSettings, valkey: str, client: redis.Redis) -> None:
    app = celery_application(make_settings(redis_url=valkey))
    assert ring(app)
    client.config_set("maxmemory", 1)
    assert ring(app) is False
    client.config_set("maxmemory", 0)
    assert ring(app)


def test_ringing_works_again_when_the_broker_is_back(make_settings: MakeSettings, valkey: str, client: redis.Redis) -> None:
    app = celery_application(make_settings(redis_url=valkey))
    assert ring(app)
    client.client_kill_filter(_type="normal", skipme=True)  # as a restart does: every connection breaks
    assert ring(app)
    assert client.llen("celery") == 2


def test_broker_answers(valkey: str) -> None:
    assert broker_answers(valkey)
    assert not broker_answers("redis+socket:///nonexistent/valkey.sock")


def test_a_broker_that_hangs_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        assert not broker_answers(f"redis://127.0.0.1:{silent.getsockname()[1]}/0", timeout_seconds=0.2)
    assert time.monotonic() - started < 2
