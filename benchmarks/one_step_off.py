"""Would rollouts that vLLM samples while the trainer works on the step before make a run faster? (One step off the policy.)

    .venv/bin/python -m benchmarks.one_step_off [--rounds 4] [--steps 5] [--tokens 20]

Starts vLLM (`make vllm`) as `sdft up` would, and trains on learning.py's data with its rollouts. In turn, each round: `--steps`
steps as a job takes them, sampling and then the gradient; then as many in which the next step's rollouts are sampled meanwhile, from
the weights before this step. Prints the seconds of a step and what they are made of, round by round and as medians. What the
staleness costs in learning is another question: `python -m benchmarks.importance --stale-steps 1`.
"""

import os

from sdft_engine.contract.thread_pool import TRAINING_THREADS

os.environ.update(TRAINING_THREADS | os.environ)  # before torch is imported

import argparse
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from benchmarks.learning_parts.bench import SDFT, Bench
from core.inference_client import InferenceClient
from core.settings import Settings
from local_stack import vllm
from local_stack.ports import free_local_port
from sdft_engine.rollouts import Rollout
from sdft_engine.schedule import rows_of_step
from sdft_engine.seeds import seed_of
from sdft_engine.session import Session
from sdft_engine.step import sdft_gradient
from sdft_engine.trainer import masks_of, objective_of

START_SECONDS = 600
KEY_VARIABLE = "SAMPLER_API_KEY"
PARTS = ("load", "rollouts", "gradient")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="of each way in a round")
    parser.add_argument("--tokens", type=int, default=20, help="longest rollout (max_completion_tokens)")
    options = parser.parse_args()
    bench = Bench()
    hyperparameters = SDFT | {"max_completion_tokens": options.tokens, "n_epochs": 50}
    with tempfile.TemporaryDirectory(prefix="sdft-one-step-off-") as directory:
        os.environ[KEY_VARIABLE] = secrets.token_urlsafe(16)
        settings = Settings(data_dir=Path(directory), inference="vllm", dtype="float32", inference_api_key=SecretStr(os.environ[KEY_VARIABLE]))
        settings.served_adapters_dir.mkdir()
        with vllm_server(settings) as url:
            sampler = {"url": url, "adapters_dir": str(settings.served_adapters_dir), "name_prefix": "rollout-benchmark", "api_key_env": KEY_VARIABLE}
            with bench.session("sdft", hyperparameters, seed=1, sampler=sampler) as session:
                in_turn(session, 2)  # warms both
                rounds = [(in_turn(session, options.steps), one_step_off(session, options.steps)) for _ in range(options.rounds)]
                assert session.sampler is not None
                session.sampler.close()
    report(rounds, options.tokens)
    return 0


@contextmanager
def vllm_server(settings: Settings) -> Iterator[str]:
    """Its URL, once it answers."""
    port = free_local_port()
    command = vllm.server_command(settings, settings.base_models[0], "127.0.0.1", port)
    with (settings.data_dir / "vllm.log").open("wb") as log:
        process = subprocess.Popen(command, env=os.environ | vllm.server_environment(settings), stdout=log, stderr=subprocess.STDOUT)
    client = InferenceClient(f"http://127.0.0.1:{port}", settings)
    try:
        until = time.monotonic() + START_SECONDS
        while not client.healthy():
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"vLLM did not start:\n{(settings.data_dir / 'vllm.log').read_text()[-3000:]}")
            time.sleep(0.5)
        yield client.url
    finally:
        process.terminate()
        process.wait(60)


def in_turn(session: Session, steps: int) -> dict[str, float]:
    """Seconds of a step, all of it and by part."""
    spent = dict.fromkeys(PARTS, 0.0)
    began = time.perf_counter()
    for _ in range(steps):
        step = session.state.step + 1
        with timed(spent, "load"):
            name = load(session, step)
        with timed(spent, "rollouts"):
            rollouts = sample(session, name, step)
        with timed(spent, "gradient"):
            update(session, rollouts, step)
    return {part: seconds / steps for part, seconds in spent.items()} | {"step": (time.perf_counter() - began) / steps}


def one_step_off(session: Session, steps: int) -> dict[str, float]:
    """The same, with the next step's rollouts under way during a gradient. The first step's are there before the clock starts."""
    spent = dict.fromkeys(PARTS, 0.0)
    rollouts = sample(session, load(session, session.state.step + 1), session.state.step + 1)
    with ThreadPoolExecutor(1) as thread:
        began = time.perf_counter()
        for _ in range(steps):
            step = session.state.step + 1
            with timed(spent, "load"):
                name = load(session, step + 1)
            coming = thread.submit(sample, session, name, step + 1)
            with timed(spent, "gradient"):
                update(session, rollouts, step)
            with timed(spent, "rollouts"):
                rollouts = coming.result()
    return {part: seconds / steps for part, seconds in spent.items()} | {"step": (time.perf_counter() - began) / steps}


@contextmanager
def timed(spent: dict[str, float], part: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    spent[part] += time.perf_counter() - began


def load(session: Session, step: int) -> str:
    """Have vLLM load the student as it is now, and prove it. Returns its name there."""
    assert session.sampler is not None
    return session.sampler.synchronise(session.model, step)


def sample(session: Session, name: str, step: int) -> list[Rollout]:
    assert session.sampler is not None
    settings, prompts = session.config.distillation, [text.prompt_ids for text in session.texts]
    wanted = {"max_tokens": settings.max_completion_tokens, "temperature": session.temperature}
    return session.sampler.ask(session.model, name, rows(session, step), prompts, session.teacher_prompts, wanted, seed_of(session.config.seed, step))


def rows(session: Session, step: int) -> list[int]:
    settings = session.config.distillation
    return rows_of_step(step, settings.batch_size, len(session.demonstrations), session.config.seed, settings.n_epochs)


def update(session: Session, rollouts: list[Rollout], step: int) -> None:
    assert session.teacher is not None
    session.optimizer.zero_grad(set_to_none=True)
    sdft_gradient(session.model, rollouts, masks_of(session, rollouts), session.teacher.adapter, objective_of(session), session.budget)
    session.optimizer.step()
    session.teacher.follow()
    session.state.step = step


def report(rounds: list[tuple[dict[str, float], dict[str, float]]], tokens: int) -> None:
    table = Table("", "a step, s", "adapter to vLLM", "waiting for rollouts", "gradient", title=f"rollouts by vLLM, {tokens} tokens, {os.cpu_count()} cores")
    for number, both in enumerate(rounds, start=1):
        for way, found in zip(("in turn", "one step off"), both, strict=True):
            table.add_row(f"round {number}: {way}", *(f"{found[part]:.2f}" for part in ("step", *PARTS)))
    console = Console()
    console.print(table)
    ratio = statistics.median(first["step"] / second["step"] for first, second in rounds)
    console.print(f"one step off takes a step in 1/{ratio:.2f} of the time (median of {len(rounds)} rounds)")


if __name__ == "__main__":
    sys.exit(main())
