"""Storage that hangs: what needs it waits or is told so, and everything else is answered."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import anyio
import httpx2
import pytest

from api.state import MODELS_DELETED_AT_A_TIME
from api.storage_threads import THREADS, StorageThreads
from core.errors import StorageUnavailable
from core.storage import LocalStorage
from tests.api.model_rows import add_model
from tests.api.serving import Api, training_lines, wait_for
from tests.api.test_errors import assert_error


def test_who_finds_no_thread_is_told_so_and_who_is_patient_waits() -> None:
    released = threading.Event()
    done: list[str] = []

    async def scene() -> None:
        threads = StorageThreads(1, patience_seconds=0.1)

        async def run(name: str, patient: bool) -> None:
            await threads.run(released.wait, 20, patient=patient)
            done.append(name)

        async with anyio.create_task_group() as group:
            group.start_soon(run, "first", False)
            await anyio.sleep(0.05)
            group.start_soon(run, "patient", True)
            with pytest.raises(StorageUnavailable):
                await threads.run(released.wait, 20)
            released.set()
        assert await threads.run(sum, [1, 2]) == 3

    anyio.run(scene)
    assert done == ["first", "patient"]


def test_models_deleted_from_a_server_that_hangs_stop_no_other_request(live_api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    file_id = live_api.upload()
    released, waiting = threading.Event(), []
    names = [f"ft:tiny:default:x:{number}" for number in range(45)]  # more than the threads of all other requests
    for name in names:
        add_model(live_api, name)

    def hanging(*arguments: object) -> None:
        waiting.append(arguments)
        released.wait(60)

    monkeypatch.setattr("api.models.service.remove_from_servers", hanging)
    with httpx2.Client(base_url=f"{live_api.base_url}/v1", headers=live_api.headers, timeout=60) as client, ThreadPoolExecutor(len(names)) as pool:
        answers = [pool.submit(client.delete, f"/models/{name}") for name in names]
        try:
            wait_for(lambda: len(waiting) == MODELS_DELETED_AT_A_TIME)
            started = time.monotonic()
            assert client.get(f"/files/{file_id}/content").content == training_lines()
            assert client.get("/files", headers=live_api.admin_headers).status_code == 200  # a key that is looked up
            assert time.monotonic() - started < 5
        finally:
            released.set()
        assert {answer.result(30).status_code for answer in answers} <= {200, 503}
        assert sum(answer.result().status_code == 200 for answer in answers) >= MODELS_DELETED_AT_A_TIME


def test_chunks_pass_and_an_error_between_them_too() -> None:
    async def collected() -> list[bytes]:
        return [chunk async for chunk in StorageThreads(1).chunks(iter([b"a", b"bc"]))]

    def chunks() -> Iterator[bytes]:
        yield b"a"
        raise StorageUnavailable("gone")

    async def broken() -> None:
        with pytest.raises(StorageUnavailable):
            _ = [chunk async for chunk in StorageThreads(1).chunks(chunks())]

    assert anyio.run(collected) == [b"a", b"bc"]
    anyio.run(broken)


def test_a_store_that_hangs_stops_no_request_that_needs_none(live_api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    file_id = live_api.upload()
    downloads = 45  # more than the threads of all other requests
    released, waiting = threading.Event(), []
    read = LocalStorage.read

    def hanging(self: LocalStorage, *arguments: object) -> object:
        waiting.append(arguments)
        released.wait(60)
        return read(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalStorage, "read", hanging)
    live_api.state.storage_threads.patience_seconds = 2.0
    with httpx2.Client(base_url=f"{live_api.base_url}/v1", headers=live_api.headers, timeout=60) as client, ThreadPoolExecutor(downloads) as pool:
        answers = [pool.submit(client.get, f"/files/{file_id}/content") for _ in range(downloads)]
        try:
            wait_for(lambda: len(waiting) == THREADS)
            started = time.monotonic()
            assert client.get("/files").status_code == 200
            assert client.get("/fine_tuning/jobs", headers=live_api.admin_headers).status_code == 200  # a key that is looked up
            assert time.monotonic() - started < 5
            wait_for(lambda: sum(answer.done() for answer in answers) == downloads - THREADS, 30)
            refused = [answer.result() for answer in answers if answer.done()]
            assert_error(refused[0], 503, "storage_unavailable")
        finally:
            released.set()
        assert sorted(answer.result(30).status_code for answer in answers) == [200] * THREADS + [503] * (downloads - THREADS)
    monkeypatch.undo()
    assert live_api.client.get(f"/v1/files/{file_id}/content").content == training_lines()
