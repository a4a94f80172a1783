"""Event streams over real connections, on SQLite and Postgres: complete, in order, and gone when they are over."""

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
from openai import APIError, Stream
from openai.types.fine_tuning import FineTuningJobEvent
from sqlalchemy import update

from api.fine_tuning.jobs import event_feed, event_stream
from core.database import Database, unix_now
from core.errors import Unavailable
from core.jobs.events import append_event
from core.jobs.leases import Claim
from core.jobs.transitions import claim_for_training, create, fail, finish_cancellation, request_cancellation
from core.tables.projects import ApiKey
from tests.api.conftest import SETTINGS, MakeSettings
from tests.api.fine_tuning.event_reader import DONE, opened, parsed, read_all
from tests.api.serving import Api, on_a_port, serve, wait_for
from tests.api.test_errors import assert_error
from tests.rows import add_job, messages_of, succeed_job


@pytest.fixture
def api(make_settings: MakeSettings, database_url: str, valkey: str) -> Iterator[Api]:
    """On a port, on both databases."""
    settings = make_settings(database_url=database_url, redis_url=valkey, inference_urls=["http://127.0.0.1:1"], **SETTINGS)
    with serve(settings) as served, on_a_port(served.app) as base_url:
        yield replace(served, base_url=base_url)


def start_job(api: Api) -> tuple[str, Claim]:
    """A job that runs, with one event."""
    job_id = add_job(api.database, api.project_id)
    with api.database.transaction() as session:
        claim = claim_for_training(session, 60)
    assert claim is not None
    assert claim.job_id == job_id
    tell(api, job_id, "started")
    return job_id, claim


def tell(api: Api, job_id: str, *messages: str, **fields: Any) -> None:
    with api.database.transaction() as session:
        for message in messages:
            append_event(session, job_id, message, **fields)


def finish(api: Api, claim: Claim) -> None:
    with api.database.transaction() as session:
        succeed_job(session, claim)


def listed(api: Api, job_id: str) -> list[dict[str, Any]]:
    """The job's events as the list shows them, oldest first."""
    data: list[dict[str, Any]] = api.client.get(f"/v1/fine_tuning/jobs/{job_id}/events", params={"limit": 1000}).json()["data"]
    return data[::-1]


def streamed(api: Api, job_id: str) -> Stream[FineTuningJobEvent]:
    """As the stock client asks for it."""
    path, wanted = f"/fine_tuning/jobs/{job_id}/events", Stream[FineTuningJobEvent]
    return api.openai.get(path, cast_to=FineTuningJobEvent, stream=True, stream_cls=wanted, options={"params": {"stream": "true"}})


def test_past_events_then_live_ones_then_the_end(api: Api) -> None:
    job_id, claim = start_job(api)
    tell(api, job_id, "a\u2028b\x85 ü", level="warn", type="metrics", data={"step": 1, "text": "\u2029\r\n"})
    with opened(api, job_id) as stream:
        received = [next(stream), next(stream)]
        for message in ("live 1", "live 2"):
            tell(api, job_id, message)
            received.append(next(stream))
        finish(api, claim)
        received += stream
    *events, done = received
    assert (done.id, done.data) == (None, DONE)
    assert [event.json for event in events] == listed(api, job_id)
    assert [event.id for event in events] == [event.json["id"] for event in events]
    assert [event.json["message"] for event in events] == ["started", "a\u2028b\x85 ü", "live 1", "live 2", "The job has successfully completed"]
    assert not any(character in event.data for event in events for character in "\u2028\x85\r" if event.data)


def test_stock_client_follows_a_job_to_its_end(api: Api) -> None:
    job_id, claim = start_job(api)
    received: list[FineTuningJobEvent] = []
    for event in streamed(api, job_id):
        received.append(event)
        if event.message == "started":
            finish(api, claim)
    assert [event.message for event in received] == ["started", "The job has successfully completed"]
    assert [event.id for event in received] == [event["id"] for event in listed(api, job_id)]


@pytest.mark.parametrize("ending", ["failed", "cancelled", "cancelled while it waits"])
def test_every_ending_ends_the_stream(api: Api, ending: str) -> None:
    job_id, claim = start_job(api)
    if ending == "cancelled while it waits":
        job_id = add_job(api.database, api.project_id)
    with opened(api, job_id) as stream:
        with api.database.transaction() as session:
            if ending == "failed":
                fail(session, claim, {"code": "out_of_memory", "message": "no memory", "param": None})
            elif ending == "cancelled":
                finish_cancellation(session, claim)
            else:
                request_cancellation(session, job_id)
        *_, last, done = list(stream)
    assert last.json["message"] in ("The job failed: no memory", "The job was cancelled")
    assert done.data == DONE


def test_finished_job(api: Api) -> None:
    job_id, claim = start_job(api)
    finish(api, claim)
    *events, done = read_all(api, job_id)
    assert [event.json for event in events] == listed(api, job_id)
    assert done.data == DONE
    first, last = events[0].id, events[-1].id
    assert [sent.data for sent in read_all(api, job_id, first)] == [events[1].data, DONE]
    assert read_all(api, job_id, last) == []  # 204: a browser does not come back
    tell(api, job_id, "the model is verified")  # some events follow the job's end
    assert [sent.json["message"] for sent in read_all(api, job_id, last)[:-1]] == ["the model is verified"]


def test_many_past_events_come_page_by_page(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "PAGE", 7)
    job_id, claim = start_job(api)
    tell(api, job_id, *(f"event {number}" for number in range(33)))
    finish(api, claim)
    *events, done = read_all(api, job_id)
    assert [event.json for event in events] == listed(api, job_id)
    assert len(events) == 35
    assert done.data == DONE


def test_what_a_stream_can_not_be_asked_for(api: Api) -> None:
    job_id, _ = start_job(api)
    other_job = add_job(api.database, api.project_id)
    tell(api, other_job, "of another job")
    path = f"/v1/fine_tuning/jobs/{job_id}/events"
    for unknown in ("ftevent-unknown", "", listed(api, other_job)[0]["id"], "ü"):
        answer = api.client.get(path, params={"stream": "true"}, headers={"last-event-id": unknown.encode()})  # type: ignore[dict-item]
        assert_error(answer, 400, "invalid_cursor", "Last-Event-ID")
    assert_error(api.client.get(path, params={"stream": "true", "after": listed(api, job_id)[0]["id"]}), 400, "invalid_value", "after")
    assert api.client.get(path, params={"stream": "true"}, headers=api.other_headers).status_code == 404
    assert api.client.get(path, params={"stream": "maybe"}).status_code == 400


def test_reconnects_leave_no_gap_and_repeat_nothing(api: Api) -> None:
    """A reader that breaks off after a random number of events, while another thread writes."""
    job_id, claim = start_job(api)
    rng = random.Random(5)

    def write() -> None:
        for number in range(60):
            tell(api, job_id, *(f"{number}.{part}" for part in range(rng.randint(1, 4))))
            time.sleep(rng.random() / 20)
        finish(api, claim)

    writer = threading.Thread(target=write)
    writer.start()
    received: list[str] = []
    connections, done = 0, False
    while not done:
        connections += 1
        with opened(api, job_id, received[-1] if received else None) as stream:
            for _ in range(rng.randint(1, 9)):
                sent = next(stream, None)
                if sent is None or sent.data == DONE:
                    done = True
                    break
                assert sent.id is not None
                received.append(sent.id)
    writer.join()
    assert received == [event["id"] for event in listed(api, job_id)]
    assert connections > 5


def test_streams_of_one_job_at_different_places(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one of them still lacks, another has read before it follows the job. The feed looks rarely here, and has just looked."""
    monkeypatch.setattr(event_feed, "POLL_SECONDS", 2.0)
    job_id, claim = start_job(api)
    with opened(api, job_id) as first:
        tell(api, job_id, "given by the feed")
        received = [next(first), next(first)]
        tell(api, job_id, "read at once by the second")
        with opened(api, job_id) as second:
            received_by_second = [next(second) for _ in range(3)]
            finish(api, claim)
            received, received_by_second = [*received, *first], [*received_by_second, *second]
    ids = [event["id"] for event in listed(api, job_id)]
    assert [event.id for event in received] == [event.id for event in received_by_second] == [*ids, None]


@contextmanager
def uncommitted(api: Api, job_id: str, message: str) -> Iterator[None]:
    """An event whose sequence is taken, and which becomes visible when the block ends."""
    with api.database.transaction() as session:
        append_event(session, job_id, message)
        session.flush()
        yield


def test_lower_sequence_that_is_committed_later_is_not_left_out(make_settings: MakeSettings, postgres_url: str, valkey: str) -> None:
    """Of another job's event: its number is lower than one that was read already. (On SQLite there is one writer at a time.)"""
    settings = make_settings(database_url=postgres_url, redis_url=valkey, inference_urls=["http://127.0.0.1:1"], **SETTINGS)
    with serve(settings) as served, on_a_port(served.app) as base_url:
        api = replace(served, base_url=base_url)
        slow, quick = start_job(api)[0], start_job(api)[0]
        with opened(api, slow) as slow_stream, opened(api, quick) as quick_stream:
            assert [next(slow_stream).json["message"], next(quick_stream).json["message"]] == ["started", "started"]
            with uncommitted(api, slow, "committed late"):
                tell(api, quick, "committed early")
                assert next(quick_stream).json["message"] == "committed early"
                time.sleep(3 * event_feed.POLL_SECONDS)
            assert next(slow_stream).json["message"] == "committed late"


def test_concurrent_transactions_of_one_job(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight writers whose transactions stay open for a moment: every event once, in the order of the list."""
    monkeypatch.setattr(event_feed, "POLL_SECONDS", 0.002)
    job_id, claim = start_job(api)

    def write(name: int) -> None:
        for number in range(10):
            with uncommitted(api, job_id, f"{name}.{number}"):
                time.sleep(0.01 * (name % 3))

    with opened(api, job_id) as stream:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, range(8)))
        finish(api, claim)
        *events, done = list(stream)
    assert done.data == DONE
    assert [event.id for event in events] == [event["id"] for event in listed(api, job_id)]
    assert len(events) == 82


def test_comments_keep_the_connection_open(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "KEEPALIVE_SECONDS", 0.1)
    job_id, claim = start_job(api)
    with opened(api, job_id) as stream:
        assert next(stream).json["message"] == "started"
        assert [next(stream).data, next(stream).data] == [None, None]
        finish(api, claim)
        assert [sent.data for sent in stream][-1] == DONE


def test_waiting_streams_hold_no_database_connection(api: Api) -> None:
    """More of them than the pool has; and when they are closed, nothing follows the job any more."""
    job_id, claim = start_job(api)
    feed = api.state.event_feed
    with ExitStack() as stack:
        streams = [stack.enter_context(opened(api, job_id)) for _ in range(60)]
        assert {next(stream).json["message"] for stream in streams} == {"started"}
        wait_for(lambda: len(feed._subscriptions) == 60)
        assert api.client.get("/metrics").text.count("sdft_event_streams 60.0") == 1
        assert api.client.get("/v1/files").status_code == 200
        tell(api, job_id, "for all")
        assert {next(stream).json["message"] for stream in streams} == {"for all"}
        wait_for(lambda: api.state.database.engine.pool.checkedout() == 0)  # type: ignore[attr-defined]
    wait_for(lambda: not feed._subscriptions)
    wait_for(lambda: "sdft_event_streams 0.0" in api.client.get("/metrics").text)
    finish(api, claim)


def test_slow_reader_is_disconnected_and_comes_back_for_the_rest(api: Api) -> None:
    job_id, claim = start_job(api)
    feed, text = api.state.event_feed, "x" * 100_000
    with reader_that_reads_nothing(api, job_id) as connection:
        wait_for(lambda: len(feed._subscriptions) == 1)
        (subscription,) = feed._subscriptions
        for number in range(400):
            tell(api, job_id, f"{number} {text}")
            if subscription.ended:
                break
        wait_for(lambda: subscription.ended)
        assert subscription._waiting_bytes <= event_feed.MAX_WAITING_BYTES
        *events, last = parsed(body_of(connection))
        assert last.id is None
        assert last.json["error"]["message"] == "this reader is too slow; go on with Last-Event-ID"
    finish(api, claim)
    *rest, done = read_all(api, job_id, events[-1].id)
    assert done.data == DONE
    assert [event.id for event in (*events, *rest)] == [event["id"] for event in listed(api, job_id)]
    wait_for(lambda: not feed._subscriptions)


@contextmanager
def reader_that_reads_nothing(api: Api, job_id: str) -> Iterator[socket.socket]:
    host, port = api.base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"GET /v1/fine_tuning/jobs/{job_id}/events?stream=true HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {api.key}\r\n"
        connection.sendall(f"{head}Connection: close\r\n\r\n".encode())
        yield connection


def body_of(connection: socket.socket) -> Iterator[bytes]:
    """The chunks of a response with the chunked transfer coding."""
    file = connection.makefile("rb")
    while file.readline() != b"\r\n":
        pass
    while size := int(file.readline(), 16):
        yield file.read(size)
        file.readline()


@pytest.mark.parametrize("column", ["revoked_at", "expires_at"])
def test_stream_ends_when_its_key_does(api: Api, monkeypatch: pytest.MonkeyPatch, column: str) -> None:
    monkeypatch.setattr(event_feed, "KEY_CHECK_SECONDS", 0.1)
    job_id, _ = start_job(api)
    others_job = add_job(api.database, api.other_project_id)
    with opened(api, job_id) as stream, opened(replace(api, key=api.other_key), others_job) as other:
        assert next(stream).json["message"] == "started"
        with api.database.transaction() as session:
            session.execute(update(ApiKey).where(ApiKey.id == api.key.split("_")[1]).values({column: unix_now() - 1}))
        (last,) = list(stream)
        assert last.json["error"]["code"] == "invalid_api_key"
        tell(api, others_job, "goes on")
        assert next(other).json["message"] == "goes on"


def test_database_that_is_away_for_a_while(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id, claim = start_job(api)
    failures: list[str] = []

    def away(self: Database) -> None:
        failures.append(threading.current_thread().name)
        raise Unavailable("away")

    with opened(api, job_id) as stream:
        assert next(stream).json["message"] == "started"
        wait_for(lambda: len(api.state.event_feed._subscriptions) == 1)
        with monkeypatch.context() as patch:
            patch.setattr(Database, "reading", away)
            tell(api, job_id, "meanwhile")
            wait_for(lambda: failures.count("event-feed") > 1)
        finish(api, claim)
        assert [sent.data and sent.data != DONE and sent.json["message"] for sent in stream] == ["meanwhile", "The job has successfully completed", False]


def test_database_that_goes_away_between_two_pages(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "PAGE", 2)
    job_id, _ = start_job(api)
    tell(api, job_id, "second", "third")
    read_page: Callable[[Database, str, int], Any] = event_stream._read_page

    def fails_later(database: Database, job_id: str, position: int) -> Any:
        if position:
            raise Unavailable("away")
        return read_page(database, job_id, position)

    monkeypatch.setattr(event_stream, "_read_page", fails_later)
    with pytest.raises(APIError, match="away"):
        list(streamed(api, job_id))


def test_closed_feed_ends_every_stream(api: Api) -> None:
    job_id, _ = start_job(api)
    with opened(api, job_id) as stream:
        next(stream)
        wait_for(lambda: len(api.state.event_feed._subscriptions) == 1)
        api.state.event_feed.close()
        assert [sent.json["error"]["code"] for sent in stream] == ["service_unavailable"]
    assert [sent.json.get("message") for sent in read_all(api, job_id)] == ["started", None]
    with pytest.raises(APIError, match="Last-Event-ID"):
        list(streamed(api, job_id))


def test_created_jobs_first_event_is_streamed(api: Api) -> None:
    with api.database.transaction() as session:
        job = create(
            session,
            project_id=api.project_id,
            model="tiny",
            base_model="tiny",
            parent_model=None,
            training_file_id="file-1",
            validation_file_id=None,
            method={"type": "sdft", "sdft": {"hyperparameters": {}}},
            suffix=None,
            seed=1,
            metadata=None,
        )
    with opened(api, job.id) as stream:
        assert next(stream).json["message"] == messages_of(api.database, job.id)[0]
