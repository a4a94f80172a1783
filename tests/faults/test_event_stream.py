"""Fault 21: a reader of a job's events is cut off again and again, and the API is killed under it."""

import random
import re
import threading

import httpx2
import pytest
from sqlalchemy import select

from core.tables.jobs import JobEvent
from tests.faults.conftest import on_postgres
from tests.faults.deployment import Deployment, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Reader:
    """Reads the stream a few events at a time, and goes on with Last-Event-ID."""

    def __init__(self, deployment: Deployment, job_id: str, seed: int) -> None:
        self.ids: list[str] = []
        self.connections = 0
        self.done = False
        self._deployment, self._job_id = deployment, job_id
        self._chance = random.Random(seed)

    def run(self) -> None:
        key = self._deployment.settings.admin_key_path.read_text().strip()
        url = f"{self._deployment.url}/v1/fine_tuning/jobs/{self._job_id}/events?stream=true"
        while not self.done:
            headers = {"authorization": f"Bearer {key}"} | ({"last-event-id": self.ids[-1]} if self.ids else {})
            try:
                with httpx2.stream("GET", url, headers=headers, timeout=30) as answer:
                    self.connections += 1
                    if answer.status_code == 204:
                        self.done = True
                    self._read(answer)
            except httpx2.HTTPError:
                continue

    def _read(self, answer: httpx2.Response) -> None:
        left = self._chance.randrange(1, 6)
        for line in answer.iter_lines():
            if found := re.fullmatch(r"id: ?(ftevent-\S+)", line):
                self.ids.append(found[1])
                left -= 1
            elif line.replace(" ", "") == "data:[DONE]":
                self.done = True
                return
            if left == 0 and line == "":
                return


@on_postgres
def test_21_no_event_is_missed_or_read_twice_however_often_the_connection_breaks(deployment: Deployment) -> None:
    job_id = deployment.create_job(checkpoint_every_steps=10)
    readers = [Reader(deployment, job_id, seed) for seed in (3, 4)]  # each stands somewhere else
    threads = [threading.Thread(target=reader.run) for reader in readers]
    for thread in threads:
        thread.start()
    deployment.wait_for_step(job_id, 20)
    deployment.kill("api")
    deployment.start("api")
    deployment.wait_for_end(job_id)
    wait_for(lambda: not any(thread.is_alive() for thread in threads), 60)
    with deployment.database.reading() as session:
        written = session.scalars(select(JobEvent.id).where(JobEvent.job_id == job_id).order_by(JobEvent.sequence)).all()
    for reader in readers:
        assert reader.ids == list(written)
        assert reader.connections > 10
