"""Which correction of another sampler's rollouts comes nearest to rollouts of one's own: `sequence`, `prefix`, or none.

    .venv/bin/python -m benchmarks.importance [--stale-steps 4] [--batches 48] [--seed 1]

The sampler is the student as it was some steps ago, which is further off than any rounding. At one point of a run on learning.py's
data, gradients of many batches are averaged: twice over rollouts of the student itself, and over the sampler's with each
correction. Prints how far each average is from that of the student's own, as a share of its length, and the cosine; the second
average of the student's own says how much of that is chance. About ten minutes on two cores.
"""

import os

from sdft_engine.contract.thread_pool import TRAINING_THREADS

os.environ.update(TRAINING_THREADS | os.environ)  # before torch is imported

import argparse
import dataclasses
import random
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.learning_parts.bench import SDFT, Bench, take_steps
from sdft_engine.generation import decode_all, score
from sdft_engine.lora import STUDENT
from sdft_engine.rollouts import Rollout
from sdft_engine.sampling import Decoding, SamplingParams
from sdft_engine.seeds import seed_of
from sdft_engine.session import Session
from sdft_engine.step import sdft_gradient
from sdft_engine.trainer import masks_of, objective_of

SAMPLER = "sampler"
WARM_STEPS = 30
BATCH = 8
CORRECTIONS = ("none", "sequence", "prefix")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stale-steps", type=int, default=4, help="steps that the sampler lies behind")
    parser.add_argument("--batches", type=int, default=48, help=f"of {BATCH} rollouts, for each average")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    bench = Bench()
    with bench.session("sdft", SDFT | {"learning_rate": 1e-3, "n_epochs": 33, "batch_size": BATCH}, options.seed) as session:
        take_steps(session, WARM_STEPS)
        remember_sampler(session)
        take_steps(session, options.stale_steps)
        averages, ratio = averaged(session, options.batches, options.seed)
    report(averages, ratio, options.stale_steps, options.batches)
    return 0


def remember_sampler(session: Session) -> None:
    """Keep a copy of the student as it is now."""
    adapters = session.model.adapters
    adapters.add(SAMPLER, adapters.shapes[STUDENT], trainable=False)
    adapters.assign(SAMPLER, {name: value.detach().clone() for name, value in adapters.parameters(STUDENT).items()})


def averaged(session: Session, batches: int, seed: int) -> tuple[dict[str, Tensor], float]:
    """The average gradients by name, and the mean of the sampler's ratios."""
    sums: dict[str, Tensor] = {}
    ratios: list[float] = []
    for number in range(batches):
        rows = random.Random(seed_of(seed, "rows", number)).sample(range(len(session.texts)), BATCH)
        for name in ("own", "own again"):
            own = rollouts_from(session, rows, STUDENT, seed_of(seed, name, number))
            add(sums, name, gradient(session, own, "sequence")[0])
        other = rollouts_from(session, rows, SAMPLER, seed_of(seed, "other", number))
        scored = [dataclasses.replace(each, sampler_logps=logps_of(session, each)) for each in other]
        for correction in CORRECTIONS:
            found, ratio = gradient(session, other if correction == "none" else scored, "sequence" if correction == "none" else correction)
            add(sums, correction, found)
            ratios += [ratio] if correction == "prefix" else []
        print(f"batch {number + 1} of {batches}", file=sys.stderr, flush=True)
    return {name: total / batches for name, total in sums.items()}, sum(ratios) / len(ratios)


def rollouts_from(session: Session, rows: list[int], adapter: str, seed: int) -> list[Rollout]:
    model, settings = session.model, session.config.distillation
    ends = model.chat_format.eos_token_ids
    sequences = [
        Decoding(
            session.texts[row].prompt_ids,
            SamplingParams(settings.max_completion_tokens, session.temperature, seed=seed_of(seed, row), stop_token_ids=ends),
            adapter=adapter,
        )
        for row in rows
    ]
    with model.use(adapter):
        decode_all(model, sequences)
    return [
        Rollout(row, session.texts[row].prompt_ids, session.teacher_prompts[row], each.token_ids, each.finish_reason == "stop")
        for row, each in zip(rows, sequences, strict=True)
    ]


def logps_of(session: Session, rollout: Rollout) -> list[float]:
    """The sampler's, at temperature 1 as a server reports them."""
    logps, _ = score(session.model, rollout.student_prompt_ids + rollout.completion_ids, SAMPLER)
    return logps[len(rollout.student_prompt_ids) - 1 :]


def gradient(session: Session, rollouts: list[Rollout], correction: Any) -> tuple[Tensor, float]:
    """Of the student's factors, as one vector; and the mean ratio over the loss tokens."""
    assert session.teacher is not None
    session.optimizer.zero_grad(set_to_none=True)
    objective = dataclasses.replace(objective_of(session), importance=correction)
    statistics = sdft_gradient(session.model, rollouts, masks_of(session, rollouts), session.teacher.adapter, objective, session.budget, len(rollouts))
    parameters = session.model.adapters.parameters(STUDENT).values()
    flat = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in parameters])
    return flat, statistics.ratio_sum / max(1, statistics.loss_tokens)


def add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value.clone()


def report(averages: dict[str, Tensor], ratio: float, stale_steps: int, batches: int) -> None:
    own = averages["own"]
    table = Table("rollouts", "distance", "cosine", title=f"a sampler {stale_steps} steps behind (mean ratio {ratio:.3f}), {batches} x {BATCH} rollouts")
    for name in ("own again", *CORRECTIONS):
        distance = float((averages[name] - own).norm() / own.norm())
        cosine = float(torch.nn.functional.cosine_similarity(averages[name], own, dim=0))
        table.add_row(name, f"{distance:.3f}", f"{cosine:.3f}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
