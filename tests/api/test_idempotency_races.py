"""Two tries of one request at the same time, on both databases: however they overlap, one object comes of it."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from api.files import upload
from api.fine_tuning.jobs import creation
from core.tables.files import File
from core.tables.jobs import Job
from tests.api.serving import Api, on_a_port, training_lines
from tests.api.test_idempotency import FILES, JOBS, RETRY, count, named

Post = Callable[[dict[str, str]], httpx2.Response]
OVERLAP_SECONDS = 0.5
"""Far longer than a try takes that nothing holds up."""


@pytest.fixture
def client(api_on_both: Api) -> Iterator[httpx2.Client]:
    with on_a_port(api_on_both.app) as base_url, httpx2.Client(base_url=base_url, headers=api_on_both.headers, timeout=30, trust_env=False) as opened:
        yield opened


@pytest.fixture(params=["job", "file"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def post(kind: str, client: httpx2.Client, api_on_both: Api) -> Post:
    if kind == "job":
        body = {"model": "tiny", "training_file": api_on_both.upload(training_lines(20))}
        return lambda headers: client.post(JOBS, json=body, headers=headers)
    return lambda headers: client.post(FILES, data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", training_lines())}, headers=headers)


class HoldsUpTheFirst:
    """A function whose first call waits, before or after its work, until it is let go."""

    def __init__(self, function: Callable[..., Any], *, afterwards: bool) -> None:
        self._function = function
        self._afterwards = afterwards
        self._lock = threading.Lock()
        self._calls = 0
        self.held = threading.Event()
        self.let_go = threading.Event()

    def __call__(self, *arguments: Any) -> Any:
        with self._lock:
            self._calls += 1
            is_first = self._calls == 1
        if is_first and not self._afterwards:
            self._wait()
        result = self._function(*arguments)
        if is_first and self._afterwards:
            self._wait()
        return result

    def _wait(self) -> None:
        self.held.set()
        assert self.let_go.wait(20)


def objects(api: Api, kind: str) -> int:
    return count(api, Job) if kind == "job" else count(api, File)


def ids(*answers: httpx2.Response) -> set[str]:
    assert [answer.status_code for answer in answers] == [200] * len(answers), [answer.text for answer in answers]
    return {answer.json()["id"] for answer in answers}


@pytest.mark.parametrize("headers", [({}, RETRY), (RETRY, RETRY), (named("x"), named("x"))], ids=["first and later", "both later", "named"])
def test_the_second_waits_for_the_first_that_has_not_committed(
    api_on_both: Api, post: Post, kind: str, headers: tuple[dict[str, str], dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = creation if kind == "job" else upload
    recording = HoldsUpTheFirst(module.record_creation, afterwards=True)
    monkeypatch.setattr(module, "record_creation", recording)
    with ThreadPoolExecutor(2) as pool:
        first: Future[httpx2.Response] = pool.submit(post, headers[0])
        assert recording.held.wait(20)
        second = pool.submit(post, headers[1])
        threading.Event().wait(OVERLAP_SECONDS)
        assert not second.done(), "it can't know yet whether the first will commit"
        recording.let_go.set()
        assert len(ids(first.result(), second.result())) == 1
    assert objects(api_on_both, kind) == 1


def test_a_first_try_that_is_overtaken_by_its_later_one_creates_nothing_more(api_on_both: Api, post: Post, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name = (creation, "resolve_method") if kind == "job" else (upload.Upload, "_form_sha256")
    function = getattr(module, name)
    before = HoldsUpTheFirst(function, afterwards=False)
    monkeypatch.setattr(module, name, before if kind == "job" else lambda *arguments: before(*arguments))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, {})
        assert before.held.wait(20)
        later = post(RETRY)
        before.let_go.set()
        assert len(ids(first.result(), later)) == 1
    assert objects(api_on_both, kind) == 1
    assert len(ids(post({}), later)) == 2, "a request that comes afterwards is one of its own"


def test_a_first_that_fails_makes_room_for_the_second(api_on_both: Api, post: Post, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = creation if kind == "job" else upload
    recording = HoldsUpTheFirst(module.record_creation, afterwards=True)
    failed: list[bool] = []

    def record_and_fail_once(*arguments: Any) -> None:
        is_first = not failed
        failed.append(True)
        recording(*arguments)
        if is_first:
            raise RuntimeError("after everything was written")

    monkeypatch.setattr(module, "record_creation", record_and_fail_once)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, {})
        assert recording.held.wait(20)
        second = pool.submit(post, RETRY)
        threading.Event().wait(OVERLAP_SECONDS)
        recording.let_go.set()
        assert first.result().status_code == 500
        ids(second.result())
    assert objects(api_on_both, kind) == 1


@pytest.mark.parametrize("headers", [RETRY, named("storm")], ids=["later", "named"])
def test_a_storm_of_tries_creates_one(api_on_both: Api, post: Post, kind: str, headers: dict[str, str]) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(post, [headers] * 24))
    assert len(ids(*answers)) == 1
    assert objects(api_on_both, kind) == 1


def test_a_storm_of_first_tries_creates_all_of_them(api_on_both: Api, post: Post, kind: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(post, [{}] * 24))
    assert len(ids(*answers)) == 24
    assert objects(api_on_both, kind) == 24
    assert ids(post(RETRY)) <= ids(*answers)
