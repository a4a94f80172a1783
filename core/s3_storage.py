"""Objects in a bucket of S3, or of a store that speaks its language, through obstore.

An object of more than one part is a multipart upload: nothing can be seen under its key before the last request completes it.
obstore asks a store again that answers 5xx, hangs or breaks off, with growing pauses, as `Patience` says; what still fails is
StorageUnavailable, and the log has the store's own words.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from core.errors import ServiceError, StorageFull, StorageUnavailable
from core.ids import new_token
from core.logging import get_logger
from core.storage import CHUNK_BYTES, LISTED_AT_A_TIME, Check, ListedObject, ObjectDamaged, StoredObject, copy_into

PART_BYTES = 16 << 20
"""Of uploads. A store takes 10,000 parts: objects of 160 GB."""
PARTS_AT_A_TIME = 2
"""With the part that is being filled, a writer holds at most three in memory."""
READ_BYTES = 8 << 20
"""Of one request. A reader asks for the next ones when it has used these, so a slow one keeps no connection waiting."""
UPLOAD_TOKEN = "sdft-upload"
"""An attribute of every object: which writer wrote it."""

log = get_logger(__name__)


@dataclass(frozen=True)
class Patience:
    """With a store: how long one request may take, body included; how often and how long it is asked again; the pauses between."""

    request_seconds: float = 30
    retries: int = 5
    retry_seconds: float = 60
    first_pause_seconds: float = 0.2
    longest_pause_seconds: float = 3


@dataclass(frozen=True)
class Found:
    size_bytes: int
    e_tag: str | None
    upload_token: str | None


class S3Storage:
    """`url` is s3://bucket or s3://bucket/prefix. What is None comes from the AWS_* variables or the machine's role."""

    def __init__(
        self,
        url: str,
        *,
        endpoint_url: str | None = None,
        region: str | None = None,
        access_key_id: str | None = None,
        secret_access_key: str | None = None,
        patience: Patience = Patience(),
    ) -> None:
        given: dict[str, Any] = {"endpoint": endpoint_url, "region": region, "access_key_id": access_key_id, "secret_access_key": secret_access_key}
        self._store = S3Store.from_url(
            url,
            client_options={
                "allow_http": (endpoint_url or "").startswith("http://"),
                "connect_timeout": timedelta(seconds=min(5, patience.request_seconds)),
                "timeout": timedelta(seconds=patience.request_seconds),
            },
            retry_config={
                "max_retries": patience.retries,
                "retry_timeout": timedelta(seconds=patience.retry_seconds),
                "backoff": {
                    "init_backoff": timedelta(seconds=patience.first_pause_seconds),
                    "max_backoff": timedelta(seconds=patience.longest_pause_seconds),
                    "base": 2,
                },
            },
            disable_bulk_delete=True,  # not every store has that request
            **{name: value for name, value in given.items() if value is not None},
        )

    def open_writer(self, key: str) -> "S3Writer":
        return S3Writer(self, self._store, _checked(key))

    def write_file(self, key: str, path: Path, check: Check = lambda: None) -> StoredObject:
        return copy_into(self.open_writer(key), path, check)

    def read(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        found = self.find(key)
        if found is None:
            raise FileNotFoundError(f"{key} is not in storage")
        return self._read_range(key, found.e_tag, start, found.size_bytes if end is None else min(end, found.size_bytes))

    def exists(self, key: str) -> bool:
        return self.find(key) is not None

    def find(self, key: str) -> Found | None:
        """None where there is no such object."""
        try:
            with _store_errors():
                head = obstore.get(self._store, _checked(key), options={"head": True})
                return Found(head.meta["size"], head.meta["e_tag"], head.attributes.get(UPLOAD_TOKEN))
        except FileNotFoundError:
            return None

    def delete(self, key: str) -> None:
        try:
            with _store_errors():
                obstore.delete(self._store, _checked(key))
        except FileNotFoundError:  # S3 itself does not mind
            return

    def list_objects(self, prefix: str) -> Iterator[list[ListedObject]]:
        with _store_errors():
            pages = iter(obstore.list(self._store, _checked(prefix), chunk_size=LISTED_AT_A_TIME))
        while True:
            with _store_errors():
                page = next(pages, None)
            if page is None:
                return
            yield [ListedObject(meta["path"], meta["size"], meta["last_modified"].timestamp()) for meta in page]

    def problem(self) -> str | None:
        """Why the bucket can't be listed, in the store's words; None where it can. Changes nothing."""
        try:
            next(iter(obstore.list(self._store, chunk_size=1)), None)
        except (BaseError, OSError) as error:
            return _first_line(error)
        return None

    def discard_abandoned_uploads(self, older_than_seconds: float) -> int:
        """A rule of the bucket's does that: obstore can't list uploads that nobody completed (docs/deployment.md)."""
        return 0

    def _read_range(self, key: str, e_tag: str | None, start: int, end: int) -> Iterator[bytes]:
        """An answer that breaks off is asked for again from where it broke, by obstore."""
        for position in range(start, end, READ_BYTES):
            until = min(position + READ_BYTES, end)
            try:
                with _store_errors():
                    answer = obstore.get(self._store, key, options={"range": (position, until), "if_match": e_tag}).bytes()
            except FileNotFoundError as error:
                raise ObjectDamaged(f"{key} was deleted while it was read") from error
            content = memoryview(answer)
            if len(content) != until - position:
                raise ObjectDamaged(f"{key}: storage returned {len(content)} bytes instead of {until - position}")
            for offset in range(0, len(content), CHUNK_BYTES):
                yield bytes(content[offset : offset + CHUNK_BYTES])


class S3Writer:
    def __init__(self, storage: S3Storage, store: S3Store, key: str) -> None:
        self.key = key
        self.size_bytes = 0
        self._storage = storage
        self._token = new_token()
        self._digest = hashlib.sha256()
        self._upload: obstore.WritableFile | None = obstore.open_writer(
            store, key, attributes={UPLOAD_TOKEN: self._token}, buffer_size=PART_BYTES, max_concurrency=PARTS_AT_A_TIME
        )

    def write(self, chunk: bytes) -> None:
        if self._upload is None:
            raise ValueError(f"{self.key} is written to after its end")
        with _writing_errors(self.key):
            self._upload.write(bytes(chunk))
        self._digest.update(chunk)
        self.size_bytes += len(chunk)

    def commit(self) -> StoredObject:
        """Complete the upload, and ask what is there now: the store's answer may have been lost, or be wrong."""
        upload, self._upload = self._upload, None
        if upload is None:
            raise ValueError(f"{self.key} is committed after its end")
        failure: Exception | None = None
        try:
            upload.close()  # one that fails is aborted
        except (BaseError, OSError) as error:
            failure = error
        found = self._storage.find(self.key)
        if found is None or found.upload_token != self._token:
            raise _service_error(failure or FileNotFoundError(f"{self.key} is not there after its upload")) from failure
        if found.size_bytes != self.size_bytes:
            self._storage.delete(self.key)
            raise _service_error(OSError(f"{self.key} has {found.size_bytes} bytes after {self.size_bytes} were uploaded")) from failure
        return StoredObject(self.key, self.size_bytes, self._digest.hexdigest())

    def abort(self) -> None:
        upload, self._upload = self._upload, None
        if upload is None:
            return
        try:
            upload.__exit__(InterruptedError, None, None)  # what leaving its block by an exception does
        except (BaseError, OSError) as error:  # the bucket's rule removes it
            log.warning("upload_not_aborted", key=self.key, error=_first_line(error))


def _checked(key: str) -> str:
    if any(part in ("", ".", "..") for part in key.split("/")):
        raise ValueError(f"storage key leaves the storage directory: {key!r}")
    return key


@contextmanager
def _store_errors() -> Iterator[None]:
    """FileNotFoundError passes."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (BaseError, OSError) as error:
        raise _service_error(error) from error


@contextmanager
def _writing_errors(key: str) -> Iterator[None]:
    """Here a missing object is a missing bucket."""
    try:
        yield
    except (BaseError, OSError) as error:
        raise _service_error(error) from error


def _service_error(error: Exception) -> ServiceError:
    log.warning("object_storage_failed", error=_first_line(error))
    if "507 Insufficient Storage" in str(error):
        return StorageFull("the server's object storage is full; nothing was stored")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError):
        return StorageUnavailable("the object storage refuses this server; see its log")
    return StorageUnavailable("the object storage can't be reached or fails; try again in a moment")


def _first_line(error: Exception) -> str:
    """Without what obstore adds for its own developers."""
    return str(error).partition("\n")[0][:500]
