"""Files from the server: streamed to a temporary name, checked against the server's SHA-256, then renamed."""

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from cli.client import Client
from cli.errors import CliError
from cli.output import clean

CHUNK_BYTES = 1 << 18


def download(client: Client, path: str, target: Path, *, overwrite: bool, **params: str) -> int:
    """Fetch `path` into `target`, whole or not at all. Returns the number of bytes. Raises CliError."""
    if target.exists() and not overwrite:
        raise CliError(f"{target} exists already; choose another name with --output, or --force to overwrite it")
    if not target.parent.is_dir():
        raise CliError(f"the folder {target.parent} does not exist")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with client.download(path, **params) as answer:
            size_bytes, digest = _write(answer, temporary)
            expected = answer.headers.get("x-sha256")
        if expected is not None and digest != expected.lower():
            raise CliError(f"the download is damaged: its SHA-256 is {digest}, not {expected}; nothing was kept, try again")
        temporary.replace(target)
        if expected is not None:
            print(f"its SHA-256 is the server's: {digest}", file=sys.stderr)
    finally:
        temporary.unlink(missing_ok=True)
    return size_bytes


def file_name(suggested: str, fallback: str) -> str:
    """A name in the current directory, whatever the server suggests."""
    name = clean(suggested.replace("\\", "/")).rpartition("/")[2].strip().lstrip(".")
    return name or fallback


def _write(answer: httpx2.Response, temporary: Path) -> tuple[int, str]:
    digest, size_bytes = hashlib.sha256(), 0
    length = answer.headers.get("content-length", "")
    with temporary.open("wb") as file, _progress(int(length) if length.isdigit() else None) as progress:
        for chunk in answer.iter_raw(CHUNK_BYTES):
            file.write(chunk)
            digest.update(chunk)
            size_bytes += len(chunk)
            progress.update(progress.task_ids[0], completed=size_bytes)
        file.flush()
        os.fsync(file.fileno())
    return size_bytes, digest.hexdigest()


@contextmanager
def _progress(total_bytes: int | None) -> Iterator[Progress]:
    console = Console(stderr=True)
    columns = (TextColumn("downloading"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task("downloading", total=total_bytes)
        yield progress
