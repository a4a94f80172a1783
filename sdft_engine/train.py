"""The trainer process: `python -m sdft_engine.train RUN_DIR`.

Needs nothing but the run directory (docs/trainer.md). Exit status: 0 when result.json was written, whatever the outcome: the
worker relies on it; 2 when nothing was begun, because there is no such directory, its control.json can't be read, or another
trainer is in it; 75 when the lease ran out or the parent died (nothing is written then, because another attempt may be running);
anything else is a crash. How it ended is also said in one line.
SIGUSR1 has it write what every thread is doing to standard error, for whoever wonders why it does not get on.
Under torchrun every process trains a share of each batch (see ranks.py); one that fails writes the result and exits with 1, so
that torchrun ends the others.
"""

import os

from sdft_engine.contract.thread_pool import TRAINING_THREADS

os.environ.update(TRAINING_THREADS | os.environ)  # before torch is imported

import argparse
import faulthandler
import fcntl
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from pydantic import ValidationError

from sdft_engine.contract.config import told
from sdft_engine.contract.death_with_parent import die_with_parent
from sdft_engine.contract.errors import DiskFull, EngineError, OutOfMemory
from sdft_engine.contract.machine_clock import machine_seconds
from sdft_engine.contract.run_directory import EXIT_LEASE_EXPIRED, Control, RunDirectory, StopReason, TrainingResult
from sdft_engine.contract.sealed_directory import is_disk_full

WATCH_SECONDS = 0.5
TORN_READS = 4
EXIT_NOT_STARTED = 2
EXIT_OF_ANOTHER = 1


class Supervision:
    """What the supervisor wants, read from control.json by a thread of its own, so that the lease's end is seen in the
    middle of a long step too."""

    def __init__(self, run: RunDirectory, control: Control | None = None) -> None:
        self.run = run
        self.torchrun_pid = os.getppid() if os.environ.get("TORCHELASTIC_RUN_ID") else None
        self._terminated_by_signal = False
        self._control = control or Control()
        self._misread = 0

    def start(self) -> None:
        signal.signal(signal.SIGTERM, self._terminated)
        threading.Thread(target=self._watch, daemon=True, name="supervision").start()

    def requested(self) -> StopReason | None:
        """What control.json asks for at the moment, which may be taken back, or a signal, which may not."""
        return self._control.stop or ("requeue" if self._terminated_by_signal else None)

    def _terminated(self, number: int, frame: object) -> None:
        self._terminated_by_signal = True

    def _watch(self) -> None:
        try:
            while True:
                control = self._orders()
                if abandoned(control, self.torchrun_pid):
                    os._exit(EXIT_LEASE_EXPIRED)
                time.sleep(WATCH_SECONDS)
        except Exception:  # without this thread nothing would see the lease's end
            traceback.print_exc()
            os._exit(EXIT_LEASE_EXPIRED)

    def _orders(self) -> Control:
        """What control.json says or, where it says nothing that can be read, said before: whoever does not rename a whole file into
        its place leaves a torn one for a moment. Under a supervisor it may not stay so, because a lease could run out unseen."""
        try:
            self._control, self._misread = self.run.read_control(), 0
        except ValidationError as error:
            self._misread += 1
            if self._misread > TORN_READS and is_supervised(self._control):
                raise
            if self._misread == TORN_READS + 1:
                self.run.append_event(f"{self.run.control_path.name} can't be read, and is not obeyed: {told(error)}", level="warn")
        return self._control


def is_supervised(control: Control) -> bool:
    return control.lease_deadline is not None or control.supervisor_pid is not None


def abandoned(control: Control, torchrun_pid: int | None = None) -> bool:
    """Whether the lease ran out, or this process's parent is no longer the supervisor or, under torchrun, torchrun, which dies with
    the supervisor."""
    expired = control.lease_deadline is not None and machine_seconds() > control.lease_deadline
    return expired or (control.supervisor_pid is not None and os.getppid() != (torchrun_pid or control.supervisor_pid))


def lock(run: RunDirectory) -> bool:
    """Keep other trainers out of the directory for as long as this process lives. False where one is in it."""
    descriptor = os.open(run.path, os.O_RDONLY)  # stays open
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    return True


def run_training(run: RunDirectory, supervision: Supervision) -> TrainingResult | None:
    """The boundary of the process: every error becomes a typed result. None where another of several processes ended, which says why
    by itself, or was killed."""
    try:
        from sdft_engine.ranks import join_ranks, leave_ranks
        from sdft_engine.trainer import train

        result = train(run, supervision.requested, join_ranks())
        leave_ranks()
        return result
    except EngineError as error:  # says all there is to say
        return TrainingResult(outcome="failed", error=error.as_dict())
    except Exception as error:
        traceback.print_exc()
        return None if is_another_s_end(error) else TrainingResult(outcome="failed", error=typed(error).as_dict())


def is_another_s_end(error: Exception) -> bool:
    """Whether one of several processes failed only because its connection to another one broke."""
    from torch import distributed

    if os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    network = (distributed.DistBackendError, distributed.DistNetworkError, distributed.DistStoreError)
    return isinstance(error, network) or "gloo/transport" in str(error)


LACK_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")
"""What CUDA, torch's allocator, the system and C++ say, in lower case."""


def typed(error: Exception) -> EngineError:
    """The typed form of what torch and the system raise."""
    text = str(error)
    if isinstance(error, MemoryError) or any(said in text.lower() for said in LACK_OF_MEMORY):
        return OutOfMemory("not enough memory for a training step; lower batch_size, max_completion_tokens or lora_rank", param="method")
    if is_disk_full(error):
        return DiskFull("the disk is full; free space and start the job again")
    return EngineError(f"the trainer failed with {type(error).__name__}: {text[:500]}")


def report(run: RunDirectory, result: TrainingResult) -> None:
    """One line for whoever started the process: failures to standard error, the rest to standard output."""
    if result.outcome == "failed":
        error = result.error or {}
        sys.stderr.write(f"failed ({error.get('code')}): {' '.join(str(error.get('message')).split())}\n")
    elif result.outcome == "stopped":
        asked = run.control_path.exists() and run.read_control().stop is not None
        remedy = f"; to go on, remove {run.control_path.name} and start it again" if asked else ""
        sys.stdout.write(f"stopped ({result.stop}) after step {result.final_step} of {result.total_steps}{remedy}\n")
    else:
        sys.stdout.write(f"succeeded after {result.final_step} steps: the adapter is in {run.final_dir}\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sdft_engine.train",
        description="Train the LoRA adapter that a directory describes, without any service.",
        epilog="docs/trainer.md has an example to copy, and says what else may be in DIR, what is written, and the exit statuses.",
    )
    parser.add_argument(
        "run_dir",
        type=Path,
        metavar="DIR",
        help="holds config.json (base model, method, hyperparameters) and train.jsonl (demonstrations); "
        "metrics.jsonl, checkpoints/, final/ (the adapter) and result.json are written into it",
    )
    return parser.parse_args()


def main() -> int:
    run = RunDirectory(parse_arguments().run_dir.resolve())
    if not run.path.is_dir():
        sys.stderr.write(f"{run.path} is not a directory\n")
        return EXIT_NOT_STARTED
    try:
        control = run.read_control()
    except ValidationError as error:
        sys.stderr.write(f"{run.control_path} can't be read: {told(error)}\n")
        return EXIT_NOT_STARTED
    if os.environ.get("RANK", "0") == "0" and not lock(run):
        sys.stderr.write(f"another trainer is at work in {run.path}\n")
        return EXIT_NOT_STARTED
    run.result_path.unlink(missing_ok=True)  # an earlier run's would be taken for this one's
    supervision = Supervision(run, control)
    if control.supervisor_pid is not None:
        die_with_parent()
    if abandoned(control, supervision.torchrun_pid):  # among others, a supervisor that died before prctl
        return EXIT_LEASE_EXPIRED
    supervision.start()
    result = run_training(run, supervision)
    if result is None:
        return EXIT_OF_ANOTHER
    is_first, is_alone = os.environ.get("RANK", "0") == "0", os.environ.get("WORLD_SIZE", "1") == "1"
    if is_first or result.outcome == "failed":
        run.write_result(result)
        report(run, result)
    return 1 if result.outcome == "failed" and not is_alone else 0  # else the other processes would wait for this one


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1)
    sys.exit(main())
