"""The devices that this worker owns, dealt out to the jobs that it trains: a job sees its own and no others.

A worker owns the GPUs that the driver lists, as far as CUDA_VISIBLE_DEVICES shows them, or those in SDFT_DEVICES. Each job gets
SDFT_DEVICES_PER_JOB of them; with more than one its trainer runs in as many processes, under torchrun. Without a GPU the CPU is one
slot, or SDFT_TRAINING_SLOTS.
"""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from core.logging import get_logger
from core.settings import Settings

CPU = "cpu"
DRIVER_SECONDS = 20
LAUNCHER = (sys.executable, "-m", "sdft_engine.launch")
"""Called with a number of processes and the run directory."""

log = get_logger(__name__)


@dataclass(frozen=True)
class DeviceGroup:
    """What one job trains on: names as CUDA_VISIBLE_DEVICES has them, or `cpu` once for every process; none where no GPU was found,
    and the trainer looks for itself."""

    devices: tuple[str, ...] = ()

    def command(self, trainer_command: tuple[str, ...]) -> tuple[str, ...]:
        return (*LAUNCHER, str(len(self.devices))) if len(self.devices) > 1 else trainer_command

    def environment(self) -> dict[str, str]:
        """What hides all other devices from a trainer."""
        if not self.devices:
            return {}
        return {"CUDA_VISIBLE_DEVICES": "" if CPU in self.devices else ",".join(self.devices)}


class Slots:
    """The groups of devices that are free. Safe for several threads."""

    def __init__(self, groups: list[DeviceGroup]) -> None:
        self.groups = tuple(groups)
        self._free = list(groups)
        self._lock = threading.Lock()

    @contextmanager
    def take(self) -> Iterator[DeviceGroup | None]:
        """A group for the length of the block, or None where all are in use."""
        with self._lock:
            group = self._free.pop(0) if self._free else None
        try:
            yield group
        finally:
            if group is not None:
                with self._lock:
                    self._free.append(group)


class DevicesMissing(Exception):
    """The devices that the settings ask for are not there: said at the start, for whoever starts the worker."""


def training_groups(settings: Settings) -> list[DeviceGroup]:
    """One group for every job that this worker trains at a time. Raises DevicesMissing."""
    devices = settings.devices if settings.devices is not None else _found_devices(settings)
    if not devices:
        return [DeviceGroup()] * settings.training_slots
    each = settings.devices_per_job
    if each > len(devices):
        raise DevicesMissing(f"SDFT_DEVICES_PER_JOB is {each}, and this worker has {len(devices)}: {', '.join(devices)}")
    groups = [DeviceGroup(tuple(devices[start : start + each])) for start in range(0, len(devices) - each + 1, each)]
    if left := len(devices) % each:
        log.warning("devices_left_over", devices=devices[-left:], devices_per_job=each)
    return groups


def _found_devices(settings: Settings) -> list[str]:
    """GPUs, by what CUDA_VISIBLE_DEVICES names or else by their UUIDs; empty where training is on the CPU. Raises DevicesMissing."""
    if settings.device == "cpu":
        return []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        return list(_listed_by_driver(program))
    except subprocess.TimeoutExpired as error:  # it may only be slow; with fewer devices than there are a worker would stay for good
        raise DevicesMissing(
            f"the driver has not listed its GPUs within {DRIVER_SECONDS} seconds; start the worker again, name them in SDFT_DEVICES, or set SDFT_DEVICE=cpu"
        ) from error
    except (subprocess.SubprocessError, OSError) as error:
        if settings.device == "cuda":
            raise DevicesMissing(f"SDFT_DEVICE is cuda, and the driver lists no GPU: {error}") from error
        log.warning("gpus_not_listed", error=str(error))  # a driver without a device, as on a machine whose GPU is another container's
        return []


@cache
def _listed_by_driver(program: str) -> tuple[str, ...]:
    """Asked once: the pool's threads and the slots are for the same devices. Raises SubprocessError or OSError."""
    command = [program, "--query-gpu=uuid", "--format=csv,noheader"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=DRIVER_SECONDS).stdout
    return tuple(line.strip() for line in listed.splitlines() if line.strip())
