"""Files and jobs over the wire, for rows that measure something else."""

import json
import time
from collections.abc import Callable
from typing import Any

import httpx2

from benchmarks.load_parts.service import MODEL, Service

LINES = b"".join(
    json.dumps({"messages": [{"role": "user", "content": f"Which lamp is lamp {n}?"}, {"role": "assistant", "content": f"Lamp {n} is red."}]}).encode() + b"\n"
    for n in range(12)
)


def client_of(service: Service) -> httpx2.Client:
    return httpx2.Client(base_url=f"{service.url}/v1", headers={"authorization": f"Bearer {service.key}"}, timeout=60, trust_env=False)


def upload(client: httpx2.Client) -> str:
    answer = client.post("/files", files={"file": ("lamps.jsonl", LINES)}, data={"purpose": "fine-tune"}).raise_for_status()
    return str(answer.json()["id"])


def job_body(training_file: str, **hyperparameters: Any) -> dict[str, Any]:
    method = {"type": "sdft", "sdft": {"hyperparameters": {"lora_rank": 4, "max_completion_tokens": 16, "checkpoint_every_steps": 10_000} | hyperparameters}}
    return {"model": MODEL, "training_file": training_file, "seed": 7, "method": method}


def create_job(client: httpx2.Client, training_file: str, **hyperparameters: Any) -> str:
    return str(client.post("/fine_tuning/jobs", json=job_body(training_file, **hyperparameters)).raise_for_status().json()["id"])


def job_of(client: httpx2.Client, job_id: str) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"/fine_tuning/jobs/{job_id}").raise_for_status().json()
    return found


def cancel(client: httpx2.Client, job_id: str) -> None:
    client.post(f"/fine_tuning/jobs/{job_id}/cancel").raise_for_status()


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 120, every: float = 0.1) -> None:
    """Raises SystemExit where it takes longer."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise SystemExit(f"after {seconds:g} s still not: {what}")
        time.sleep(every)
