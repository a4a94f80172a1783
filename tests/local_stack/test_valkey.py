import os
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from core.doorbell import broker_answers
from local_stack import valkey
from local_stack.errors import StackError
from local_stack.leftovers import find_leftovers
from tests.local_stack.conftest import wait_for

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def program() -> Path:
    found = valkey.find_program()
    assert found is not None
    return found


@pytest.fixture
def socket_path(data_dir: Path) -> Iterator[Path]:
    """As for a real start: short, in a private directory."""
    path = valkey.usable_socket_path(data_dir / "valkey" / "valkey.sock")
    for directory in (data_dir / "valkey", path.parent):
        valkey.prepare_private_directory(directory)
    yield path
    path.unlink(missing_ok=True)
    if path.parent != data_dir / "valkey":
        path.parent.rmdir()


def serve(start_process: Start, program: Path, data_dir: Path, socket_path: Path) -> "subprocess.Popen[bytes]":
    process = start_process(*valkey.server_command(program, data_dir / "valkey", socket_path), stdout=subprocess.DEVNULL)
    wait_for(lambda: broker_answers(f"redis+socket://{socket_path}"))
    return process


def test_messages_survive_a_clean_stop(start_process: Start, program: Path, data_dir: Path, socket_path: Path) -> None:
    first = serve(start_process, program, data_dir, socket_path)
    redis.Redis(unix_socket_path=str(socket_path)).rpush("celery", "look for work")
    first.terminate()
    assert first.wait(10) == 0
    assert not broker_answers(f"redis+socket://{socket_path}")
    serve(start_process, program, data_dir, socket_path)
    assert redis.Redis(unix_socket_path=str(socket_path)).lrange("celery", 0, -1) == [b"look for work"]


def test_messages_survive_a_kill(start_process: Start, program: Path, data_dir: Path, socket_path: Path) -> None:
    first = serve(start_process, program, data_dir, socket_path)
    client = redis.Redis(unix_socket_path=str(socket_path))
    client.rpush("celery", "look for work")
    first.send_signal(signal.SIGKILL)
    first.wait(10)
    serve(start_process, program, data_dir, socket_path)
    assert client.lrange("celery", 0, -1) == [b"look for work"]


def test_it_listens_on_a_private_socket_alone(start_process: Start, program: Path, data_dir: Path, socket_path: Path) -> None:
    serve(start_process, program, data_dir, socket_path)
    assert redis.Redis(unix_socket_path=str(socket_path)).config_get("port") == {"port": "0"}
    assert stat.S_IMODE(socket_path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(socket_path.stat().st_mode) == 0o700


def test_its_command_line_names_the_data_directory(start_process: Start, program: Path, data_dir: Path, socket_path: Path) -> None:
    process = serve(start_process, program, data_dir, socket_path)
    assert {role: [found.pid for found in processes] for role, processes in find_leftovers(data_dir).items()} == {"valkey": [process.pid]}


def test_a_short_path_is_used_as_it_is_and_a_long_one_is_replaced() -> None:
    short = Path("/data/valkey/valkey.sock")
    assert valkey.usable_socket_path(short) == short
    long = Path("/data") / ("x" * 90) / "valkey.sock"
    replaced = valkey.usable_socket_path(long)
    assert len(os.fsencode(replaced)) <= valkey.LONGEST_SOCKET_PATH_BYTES
    assert replaced == valkey.usable_socket_path(long)
    assert replaced != valkey.usable_socket_path(Path("/data") / ("y" * 90) / "valkey.sock")


def test_a_directory_becomes_private(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    valkey.prepare_private_directory(tmp_path / "open")
    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o700


def test_a_link_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    """Somebody else may have put it there, in a directory that all may write."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    with pytest.raises(StackError, match="link"):
        valkey.prepare_private_directory(tmp_path / "link")


def test_a_server_on_path_stands_in_for_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_packaged() -> Path:
        raise valkey.ValkeyBinaryNotFoundError("no binary for this machine")

    monkeypatch.setattr(valkey, "get_binary_path", not_packaged)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert valkey.find_program() is None
    (tmp_path / "redis-server").write_text("#!/bin/sh\n")
    (tmp_path / "redis-server").chmod(0o755)
    assert valkey.find_program() == tmp_path / "redis-server"
