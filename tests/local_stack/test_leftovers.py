"""Which processes count as left behind, and that they are stopped in order."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from local_stack import leftovers
from local_stack.leftovers import find_leftovers, role_of, stop_leftovers
from tests.local_stack.conftest import wait_for

Start = Callable[..., "subprocess.Popen[bytes]"]
DIR = Path("/data/sdft")


@pytest.mark.parametrize(
    ("argv", "role"),
    [
        (["/venv/bin/python", "-P", "-X", "data_dir=/data/sdft", "-m", "uvicorn", "api.app:app", "--env-file", "/data/sdft/service.env"], "api"),
        (["python3", "-m", "celery", "--workdir", "/data/sdft", "-A", "worker.app", "worker"], "worker"),
        (["python3", "-m", "sdft_engine.train", "/data/sdft/runs/ftjob-1/attempt-1"], "trainer"),
        (["python3", "-X", "data_dir=/data/sdft", "-m", "inference", "--port", "1"], "inference"),
        (["python3", "-X", "data_dir=/data/sdft", "-m", "migrations"], "preparation"),
        (["/opt/valkey-server", "--dir", "/data/sdft/valkey", "--port", "0"], "valkey"),
        (["redis-server", "--dir", "/data/sdft/valkey"], "valkey"),
        # other programs on this directory
        (["tail", "-f", "/data/sdft/logs/api.log"], None),
        (["python3", "/data/sdft/script.py"], None),
        (["bash", "-c", "python3 -m inference /data/sdft"], None),
        (["sdft", "up", "--data-dir", "/data/sdft"], None),
        (["python3", "-m", "celery", "--workdir", "/data/sdft", "-A", "another.app", "worker"], None),
        (["python3", "-m", "uvicorn", "another:app", "--app-dir", "/data/sdft"], None),
        # our programs on other directories
        (["python3", "-m", "celery", "--workdir", "/data/sdft2", "-A", "worker.app", "worker"], None),
        (["python3", "-m", "celery", "--workdir", "/data/sdft/inner", "-A", "worker.app", "worker"], None),
        (["python3", "-m", "celery", "--workdir", "/other/data/sdft", "-A", "worker.app", "worker"], None),
        (["python3", "-X", "data_dir=/data/sdft2", "-m", "inference"], None),
        (["python3", "-m", "sdft_engine.train", "/data/sdft/inner/runs/ftjob-1/attempt-1"], None),
        (["valkey-server", "--dir", "/data/sdft/inner/valkey"], None),
        ([], None),
        (["/data/sdft"], None),
        (["python3", "/data/sdft", "-m"], None),
    ],
)
def test_roles(argv: list[str], role: str | None) -> None:
    assert role_of(argv, DIR) == role


@pytest.fixture
def masquerade(start_process: Start, tmp_path: Path) -> Callable[..., "subprocess.Popen[bytes]"]:
    """A small program that looks in the process table like one of ours: `python -m <module>` from a directory of stand-ins."""

    def start(role: str, module: str, *words: str, program: str) -> "subprocess.Popen[bytes]":
        stand_ins = tmp_path / f"stand-ins-{role}"
        path = stand_ins / (module.replace(".", "/") + ".py")
        path.parent.mkdir(parents=True)
        prelude = f"import signal, sys, time\ndef note(word): open({str(tmp_path / 'notes')!r}, 'a').write(word + '\\n')\n"
        path.write_text(prelude + program)
        process = start_process(sys.executable, "-m", module, *words, cwd=stand_ins)
        wait_for(lambda: (tmp_path / "notes").exists() and f"{role}-up" in (tmp_path / "notes").read_text())
        return process

    return start


def obedient(role: str) -> str:
    end = f"lambda *_: (time.sleep(0.2), note('{role}'), sys.exit(0))"
    return f"signal.signal(signal.SIGTERM, {end})\nnote('{role}-up')\ntime.sleep(60)\n"


def ended(notes: list[str]) -> list[str]:
    return [word for word in notes if not word.endswith("-up")]


def test_they_stop_in_order_the_worker_first(masquerade: Callable[..., object], data_dir: Path, notes: Callable[[], list[str]]) -> None:
    masquerade("inference", "inference", "--adapters-dir", str(data_dir), program=obedient("inference"))
    masquerade("api", "uvicorn", "api.app:app", str(data_dir), program=obedient("api"))
    masquerade("trainer", "sdft_engine.train", f"{data_dir}/runs/ftjob-1/attempt-1", program=obedient("trainer"))
    masquerade("worker", "celery", "--workdir", str(data_dir), "-A", "worker.app", "worker", program=obedient("worker"))
    assert list(find_leftovers(data_dir)) == ["worker", "trainer", "api", "inference"]
    said: list[str] = []
    stop_leftovers(data_dir, said.append)
    assert ended(notes()) == ["worker", "trainer", "api", "inference"]
    assert find_leftovers(data_dir) == {}
    assert len(said) == 4
    assert "stopping the worker (pid" in said[0]


def test_a_trainer_that_its_worker_ends_is_not_signalled_again(masquerade: Callable[..., object], data_dir: Path, notes: Callable[[], list[str]]) -> None:
    trainer = masquerade("trainer", "sdft_engine.train", f"{data_dir}/runs/1", program=obedient("trainer"))
    assert isinstance(trainer, subprocess.Popen)
    end = f"lambda *_: (__import__('os').kill({trainer.pid}, 9), note('worker'), sys.exit(0))"
    program = f"signal.signal(signal.SIGTERM, {end})\nnote('worker-up')\ntime.sleep(60)\n"
    masquerade("worker", "celery", "--workdir", str(data_dir), "-A", "worker.app", "worker", program=program)
    stop_leftovers(data_dir, lambda _: None)
    assert ended(notes()) == ["worker"]


def test_one_that_ignores_sigterm_is_killed_with_its_group(masquerade: Callable[..., object], data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(leftovers.STOP_ORDER, "inference", 0.3)
    program = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nnote('inference-up')\ntime.sleep(60)\n"
    process = masquerade("inference", "inference", str(data_dir), program=program)
    assert isinstance(process, subprocess.Popen)
    said: list[str] = []
    stop_leftovers(data_dir, said.append)
    assert process.wait(5) == -signal.SIGKILL
    assert "is killed" in said[-1]


def test_processes_of_other_directories_live_on(masquerade: Callable[..., object], data_dir: Path) -> None:
    other = data_dir.parent / "data-of-others"
    other.mkdir()
    process = masquerade("inference", "inference", str(other), program=obedient("inference"))
    assert isinstance(process, subprocess.Popen)
    stop_leftovers(data_dir, lambda _: None)
    assert process.poll() is None


def test_processes_of_other_users_are_left_alone(masquerade: Callable[..., object], data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masquerade("inference", "inference", str(data_dir), program=obedient("inference"))
    assert "inference" in find_leftovers(data_dir)
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    assert find_leftovers(data_dir) == {}


def test_a_process_that_cannot_see_the_directory_is_none_of_ours(masquerade: Callable[..., object], data_dir: Path) -> None:
    """In a container the same path means something else."""
    masquerade("inference", "inference", str(data_dir), program=obedient("inference"))
    assert "inference" in find_leftovers(data_dir)
    data_dir.rename(data_dir.with_name("moved"))
    assert find_leftovers(data_dir) == {}


def test_one_that_nobody_reaps_counts_as_ended(masquerade: Callable[..., object], data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container without an init, a killed run's children stay zombies."""
    monkeypatch.setitem(leftovers.STOP_ORDER, "inference", 60)
    process = masquerade("inference", "inference", str(data_dir), program=obedient("inference"))
    assert isinstance(process, subprocess.Popen)
    started = time.monotonic()
    stop_leftovers(data_dir, lambda _: None)  # `process` is our own child and not waited for, so it stays a zombie
    assert time.monotonic() - started < 30
    assert find_leftovers(data_dir) == {}
