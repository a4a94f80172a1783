"""Data-parallel training: the rows of a step are dealt out to processes, their gradients added up.

    torchrun --nproc-per-node 2 -m sdft_engine.train RUN_DIR

Every process holds the model and takes the same steps; only the first writes. A loss is a mean over the sequences of the whole
batch, so the sum of the processes' gradients is the gradient of one process, up to rounding. One process needs no group.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed, nn

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""A process waits that long for the others: as long as the slowest rollouts of a step may take."""


@dataclass(frozen=True)
class Ranks:
    """This process's place (from 0) among `size`."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def own(self, items: Sequence[T]) -> list[T]:
        """This process's share: every `size`-th, which may be none."""
        return list(items[self.rank :: self.size])

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of all processes, in every process. One without a gradient counts as zero."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad)

    def collect(self, value: T) -> list[T]:
        """Every process's value, by rank, in every process."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value)
        return found

    def deal_back(self, shares: Sequence[Sequence[T]]) -> list[T]:
        """The whole from its shares, in the order before `own` dealt it out."""
        longest = max(map(len, shares))
        return [share[place] for place in range(longest) for share in shares if place < len(share)]

    def agree(self, value: T) -> T:
        """The first process's value, in every process."""
        if self.size == 1:
            return value
        shared: list[Any] = [value]
        distributed.broadcast_object_list(shared, src=0)
        return shared[0]


def join_ranks() -> Ranks:
    """The group that torchrun's environment variables describe, or one process alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Ranks()
    if torch.cuda.is_available():  # every process of a machine has a device of its own
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    return Ranks(distributed.get_rank(), size)


def leave_ranks() -> None:
    """Give the group up, once all processes are done: its threads may otherwise still hold tensors when the interpreter ends, which
    aborts the process now and then. Not after a failure: the others may be waiting for this process, and it for them."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
