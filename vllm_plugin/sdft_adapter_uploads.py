"""Adapters that a server is sent over HTTP, where it shares no disk with those who have them loaded.

    PUT /adapter_files/{name}/{file}    the bytes, with their Content-Digest (RFC 9530, sha-256)  →  {"lora_path": DIR}
    DELETE /adapter_files/{name}        both files; no error where there are none
    GET /adapter_files                  {"names": [NAME, …]}

DIR is what /v1/load_lora_adapter is asked for then. A file is there whole or not at all, and its bytes never change under its name.
Nothing is read from it here: the server's own loader does that.

ASGI middleware for both inference servers, with nothing but starlette: vLLM's has it from sdft_vllm_key.RequireKey, behind the key, and
the embedded one from its app.py (inference/adapter_uploads.py is a link to this file).
"""

import asyncio
import base64
import errno
import fcntl
import hashlib
import re
import secrets
import shutil
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

FILES_PATH = "/adapter_files"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
MOST_BYTES = {"adapter_config.json": 1024**2, "adapter_model.safetensors": 8 * 1024**3}
"""By PEFT's names, which are the only ones."""
DIGEST = re.compile(r"sha-256=:([A-Za-z0-9+/]{43}=):")
BLOCK_BYTES = 4 * 1024**2
"""Written at a time, in a thread."""
UNFINISHED_NAME = ".unfinished"
LOCK_NAME = ".lock"


class UploadRefused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class AdapterUploads:
    """Answers what is below FILES_PATH, and leaves the rest to `app`."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], files: "UploadedFiles") -> None:
        self._app = app
        self._files = files

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not is_upload(scope["path"]):
            await self._app(scope, receive, send)
            return
        try:
            answer = await self._answer(Request(scope, receive), scope["path"].removeprefix(FILES_PATH).split("/")[1:])
        except UploadRefused as error:
            body = {"message": error.message, "type": "invalid_request_error", "param": None, "code": error.status}
            answer = JSONResponse({"error": body}, status_code=error.status)
        except ClientDisconnect:  # nobody waits for an answer, and nothing was kept
            return
        await answer(scope, receive, send)

    async def _answer(self, request: Request, parts: list[str]) -> Response:
        if request.method == "GET" and not parts:
            return JSONResponse({"names": self._files.names()})
        if request.method == "DELETE" and len(parts) == 1:
            await asyncio.to_thread(self._files.remove, _valid(parts[0]))
            return JSONResponse({})
        if request.method == "PUT" and len(parts) == 2:
            name, file = _valid(parts[0]), parts[1]
            if file not in MOST_BYTES:
                raise UploadRefused(400, f"{file!r:.100} is no file of an adapter: {' and '.join(MOST_BYTES)} are")
            length, digest = request.headers.get("content-length", ""), DIGEST.fullmatch(request.headers.get("content-digest", ""))
            if digest is None:
                raise UploadRefused(400, "the header Content-Digest with the body's sha-256 is missing or malformed")
            if length.isdigit() and int(length) > MOST_BYTES[file]:
                raise UploadRefused(413, _too_large(file))
            directory = await self._files.store(name, file, base64.b64decode(digest[1]), request.stream())
            return JSONResponse({"lora_path": str(directory)})
        raise UploadRefused(404, f"there is no {request.method} {FILES_PATH}{''.join(f'/{part}' for part in parts)}"[:300])


class UploadedFiles:
    """One directory for each adapter in `directory`, which is this server's own: what an earlier one was sent is removed from it. So
    nothing has to be synced to the disk.

    Raises RuntimeError where another server uses the directory, or something else lies in it.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory.resolve()
        self._unfinished = self._directory / UNFINISHED_NAME  # which no adapter can be called
        self._changing = threading.Lock()
        self._own = (self._directory / LOCK_NAME).open("ab")  # locked as long as this process lives
        try:
            fcntl.flock(self._own, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"{directory} is in use by another server: each needs one of its own for what it is sent") from error
        self._empty()

    def _empty(self) -> None:
        left = [path for path in self._directory.iterdir() if path.name != LOCK_NAME]
        for path in left:
            if path != self._unfinished and not (path.is_dir() and NAME.fullmatch(path.name) and {file.name for file in path.iterdir()} <= MOST_BYTES.keys()):
                raise RuntimeError(f"{path} is nothing that a server was sent: name a directory that is empty or missing, for this server alone")
        for path in left:
            shutil.rmtree(path)
        self._unfinished.mkdir()

    def names(self) -> list[str]:
        return sorted(path.name for path in self._directory.iterdir() if NAME.fullmatch(path.name))

    async def store(self, name: str, file: str, sha256: bytes, body: AsyncIterator[bytes]) -> Path:
        """Returns the adapter's directory. Raises UploadRefused, or ClientDisconnect where the body ends too early; then nothing is kept."""
        unfinished = self._unfinished / secrets.token_hex(16)
        found, written_bytes = hashlib.sha256(), 0
        try:
            with unfinished.open("xb") as target:
                async for block in _in_blocks(body):
                    written_bytes += len(block)
                    if written_bytes > MOST_BYTES[file]:
                        raise UploadRefused(413, _too_large(file))
                    await asyncio.to_thread(lambda block=block: (found.update(block), target.write(block)))
            if found.digest() != sha256:
                raise UploadRefused(400, f"the body of {written_bytes:,} bytes is not what its Content-Digest says")
            return await asyncio.to_thread(self._place, unfinished, name, file, sha256)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UploadRefused(507, "the server's disk is full") from error
        finally:
            unfinished.unlink(missing_ok=True)

    def _place(self, unfinished: Path, name: str, file: str, sha256: bytes) -> Path:
        directory = self._directory / name
        target = directory / file
        with self._changing:
            if not target.resolve().is_relative_to(self._directory):  # the second wall behind NAME
                raise UploadRefused(400, "the name leads out of the server's directory")
            if target.exists():
                with target.open("rb") as there:
                    if hashlib.file_digest(there, "sha256").digest() != sha256:
                        raise UploadRefused(409, f"{name} has another {file} already: what is loaded from it must not change")
            else:
                directory.mkdir(exist_ok=True)
                unfinished.rename(target)
        return directory

    def remove(self, name: str) -> None:
        with self._changing, suppress(FileNotFoundError):
            shutil.rmtree(self._directory / name)


def is_upload(path: str) -> bool:
    return path == FILES_PATH or path.startswith(f"{FILES_PATH}/")


def _valid(name: str) -> str:
    if not NAME.fullmatch(name):
        raise UploadRefused(400, f"{name!r:.100} is no adapter's name: 1 to 200 letters, digits, dots, dashes and underscores, a letter or digit first")
    return name


def _too_large(file: str) -> str:
    return f"{file} may have {MOST_BYTES[file]:,} bytes"


async def _in_blocks(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in pieces that are worth a thread each."""
    block = bytearray()
    async for chunk in body:
        block += chunk
        if len(block) >= BLOCK_BYTES:
            yield bytes(block)
            block.clear()
    yield bytes(block)
