"""A process's memory, descriptors and threads over time, and whether they grow."""

import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

MIB = 1 << 20
WARM_UP_SHARE = 1 / 3
"""Of the run: pools fill, code is imported, the allocator finds its size."""
FEWEST_SAMPLES = 10
MOST_GROWN_SHARE = 0.05
MOST_GROWN_BYTES = 8 * MIB
MOST_GROWN_DESCRIPTORS = 5.0


@dataclass(frozen=True)
class Sample:
    """`at` in seconds since the first one."""

    at: float
    rss_bytes: int
    descriptors: int
    threads: int
    children: int


@dataclass(frozen=True)
class Trend:
    """One process's samples after the warm-up. What grew is a fitted line's rise over them."""

    process: str
    samples: int
    median_rss_bytes: float
    grown_bytes: float
    grown_bytes_per_hour: float
    median_descriptors: float
    grown_descriptors: float
    median_threads: float
    most_children: int

    @property
    def allowed_bytes(self) -> float:
        """Room for what an allocator does by itself."""
        return max(MOST_GROWN_BYTES, MOST_GROWN_SHARE * self.median_rss_bytes)

    @property
    def faults(self) -> list[str]:
        found = []
        if self.grown_bytes > self.allowed_bytes:
            found.append(f"{self.process}: memory grew by {self.grown_bytes / MIB:.1f} MiB (at most {self.allowed_bytes / MIB:.1f})")
        if self.grown_descriptors > MOST_GROWN_DESCRIPTORS:
            found.append(f"{self.process}: descriptors grew by {self.grown_descriptors:.1f} (at most {MOST_GROWN_DESCRIPTORS:g})")
        return found


class Sampler:
    """Looks at the processes (name to id) every few seconds, in a thread of its own."""

    def __init__(self, pids: Mapping[str, int], every_seconds: float) -> None:
        self.samples: dict[str, list[Sample]] = {name: [] for name in pids}
        self._processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        self._every_seconds = every_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        began = time.monotonic()
        while not self._ended.wait(self._every_seconds):
            for name, process in self._processes.items():
                try:
                    with process.oneshot():
                        memory, descriptors, threads = process.memory_info().rss, process.num_fds(), process.num_threads()
                    sample = Sample(time.monotonic() - began, memory, descriptors, threads, len(process.children(recursive=True)))
                except psutil.NoSuchProcess:  # whoever works with it counts that
                    continue
                self.samples[name].append(sample)


def trend_of(process: str, samples: Sequence[Sample]) -> Trend:
    """Raises ValueError on too few samples."""
    end = samples[-1].at if samples else 0.0
    kept = [sample for sample in samples if sample.at >= end * WARM_UP_SHARE]
    if len(kept) < FEWEST_SAMPLES:
        raise ValueError(f"{process}: {len(kept)} samples after the warm-up are too few for a trend (at least {FEWEST_SAMPLES})")
    times = [sample.at for sample in kept]
    window = times[-1] - times[0]
    bytes_per_second = statistics.linear_regression(times, [sample.rss_bytes for sample in kept]).slope
    descriptors_per_second = statistics.linear_regression(times, [sample.descriptors for sample in kept]).slope
    return Trend(
        process,
        len(kept),
        statistics.median(sample.rss_bytes for sample in kept),
        bytes_per_second * window,
        bytes_per_second * 3600,
        statistics.median(sample.descriptors for sample in kept),
        descriptors_per_second * window,
        statistics.median(sample.threads for sample in kept),
        max(sample.children for sample in kept),
    )
