"""What users of a small installation do all day, several at a time; every answer that should not be is counted."""

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable

import httpx2

from benchmarks.load_parts.jobs import LINES, create_job, upload
from benchmarks.load_parts.service import MODEL, Service

JOB_SECONDS = 300
CHAT = [{"role": "user", "content": "Which lamp is lamp 3?"}]
KEPT_MODELS = 2
BIG_FILE = LINES * 500
"""About 800 kB."""


class Unexpected(Exception):
    """An answer that a user would complain about; its text is the kind that it is counted as."""


class Work:
    """Loops, each in a thread with a client of its own, until `stop`."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self.done: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self._jobs: list[str] = []
        loops = (self._look, self._move_files, self._train, self._chat, self._follow)
        self._threads = [threading.Thread(target=self._run, args=(loop,), name=loop.__name__) for loop in loops]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Returns when every loop has ended; the training one first ends its job."""
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _run(self, loop: Callable[[httpx2.Client, int], None]) -> None:
        """The boundary: whatever goes wrong in a turn is counted, and the next turn comes."""
        headers = {"authorization": f"Bearer {self._service.key}"}
        with httpx2.Client(base_url=f"{self._service.url}/v1", headers=headers, timeout=120, trust_env=False) as client:
            for turn in itertools.count():
                if self._ended.is_set():
                    return
                try:
                    loop(client, turn)
                except Unexpected as error:
                    self._count(self.errors, f"{loop.__name__}: {error}")
                except httpx2.HTTPError as error:
                    self._count(self.errors, f"{loop.__name__}: {type(error).__name__}")

    def _count(self, counter: Counter[str], what: str) -> None:
        with self._lock:
            counter[what] += 1

    def _ask(self, client: httpx2.Client, what: str, method: str, path: str, **options: object) -> httpx2.Response:
        answer = client.request(method, path, **options)
        if answer.status_code != 200:
            raise Unexpected(f"{what}: status {answer.status_code}: {answer.text[:120]}")
        self._count(self.done, what)
        return answer

    def _look(self, client: httpx2.Client, turn: int) -> None:
        """Polls and lists."""
        paths = ["/fine_tuning/jobs?limit=20", "/files?limit=20", "/models"]
        if self._jobs:
            job = f"/fine_tuning/jobs/{self._jobs[-1]}"
            paths += [job, job, f"{job}/events?limit=20", f"{job}/checkpoints", f"{job}/metrics"]
        self._ask(client, "polls and lists", "GET", paths[turn % len(paths)])
        self._ended.wait(0.05)

    def _move_files(self, client: httpx2.Client, turn: int) -> None:
        """Up, down, away."""
        purpose = ("fine-tune", "user_data")[turn % 2]
        answer = self._ask(client, "uploads", "POST", "/files", files={"file": ("lamps.jsonl", BIG_FILE)}, data={"purpose": purpose})
        file_id = answer.json()["id"]
        if self._ask(client, "downloads", "GET", f"/files/{file_id}/content").content != BIG_FILE:
            raise Unexpected("another file came back")
        self._ask(client, "deletes", "DELETE", f"/files/{file_id}")
        self._ended.wait(0.5)

    def _train(self, client: httpx2.Client, turn: int) -> None:
        """A job of one or two steps; every third is cancelled while it trains. Its model answers, and the oldest go."""
        job_id = create_job(client, upload(client), n_epochs=1 if turn % 2 else 2, batch_size=12, max_completion_tokens=4)
        self._jobs.append(job_id)
        self._count(self.done, "jobs created")
        if turn % 3 == 2:
            self._wait_for(client, job_id, ("running", "succeeded"))
            answer = client.post(f"/fine_tuning/jobs/{job_id}/cancel")
            if answer.status_code not in (200, 400):  # it may have ended
                raise Unexpected(f"cancel: status {answer.status_code}")
            self._wait_for(client, job_id, ("cancelled", "succeeded"))
            return
        job = self._wait_for(client, job_id, ("succeeded",))
        self._count(self.done, "jobs trained")
        self._answer(client, str(job["fine_tuned_model"]), turn)
        models = [model["id"] for model in self._ask(client, "polls and lists", "GET", "/models").json()["data"] if model["id"].startswith("ft:")]
        for model in models[: max(0, len(models) - KEPT_MODELS)]:
            self._ask(client, "models deleted", "DELETE", f"/models/{model}")

    def _wait_for(self, client: httpx2.Client, job_id: str, statuses: tuple[str, ...]) -> dict[str, object]:
        until = time.monotonic() + JOB_SECONDS
        while time.monotonic() < until:
            job: dict[str, object] = self._ask(client, "polls and lists", "GET", f"/fine_tuning/jobs/{job_id}").json()
            if job["status"] in statuses:
                return job
            if job["status"] in ("failed", "cancelled", "succeeded"):
                raise Unexpected(f"a job is {job['status']}: {job['error']}")
            time.sleep(0.25)
        raise Unexpected(f"a job is not {statuses[0]} after {JOB_SECONDS} s")

    def _chat(self, client: httpx2.Client, turn: int) -> None:
        self._answer(client, MODEL, turn)
        self._ended.wait(0.5)

    def _answer(self, client: httpx2.Client, model: str, turn: int) -> None:
        """Whole, streamed, or streamed to a reader that goes away."""
        body = {"model": model, "messages": CHAT, "max_tokens": 8}
        if turn % 3 == 0:
            self._ask(client, "chats", "POST", "/chat/completions", json=body)
            return
        with client.stream("POST", "/chat/completions", json=body | {"stream": True}) as answer:
            if answer.status_code != 200:
                raise Unexpected(f"chat: status {answer.status_code}: {answer.read().decode()[:120]}")
            lines = [line for line in itertools.islice(answer.iter_lines(), 2 if turn % 3 == 1 else None) if line]
        if turn % 3 == 2 and lines[-1] != "data: [DONE]":
            raise Unexpected(f"a chat's stream ends with {lines[-1][:100]}")
        self._count(self.done, "chats streamed" if turn % 3 == 2 else "chats left")

    def _follow(self, client: httpx2.Client, turn: int) -> None:
        """A job's events to their end, or for a moment."""
        if not self._jobs:
            self._ended.wait(0.5)
            return
        until = time.monotonic() + 3
        with client.stream("GET", f"/fine_tuning/jobs/{self._jobs[-1]}/events?stream=true") as answer:
            if answer.status_code != 200:
                raise Unexpected(f"events: status {answer.status_code}")
            for line in answer.iter_lines():
                if line.startswith("data: {") and "error" in (data := json.loads(line[6:])) and "id" not in data:
                    raise Unexpected(f"events: {data['error'].get('message')}")
                if turn % 2 and time.monotonic() > until:
                    break
        self._count(self.done, "event streams")
        self._ended.wait(0.5)
