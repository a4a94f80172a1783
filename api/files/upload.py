"""POST /files: the body streams into storage and is checked on the way. Its parts may come in any order.

Where the purpose comes after the file, the bytes are stored first and checked from there. A row is written only after
the object is complete; whatever fails before the row's commit leaves neither.
"""

import hashlib
from functools import partial

import anyio
import anyio.to_thread
from fastapi import Request
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from api.files.contents import AnyContents, Contents, TrainingContents
from api.files.multipart import MultipartReader
from api.files.schemas import PURPOSES, file_object
from api.files.service import get_file
from api.idempotency import AlreadyCreated, Attempt, record_creation, refuse_repetition, sha256_of
from api.state import ApiState
from core.database import unix_now
from core.errors import AuthenticationFailed, BadRequest, StorageFull
from core.ids import new_id
from core.projects import valid_keys
from core.storage import StoredObject, discard, verified
from core.storage_condition import require_free_space
from core.tables.files import File
from core.tables.projects import Project

MAX_FIELD_BYTES = 8192
MAX_FILENAME_LENGTH = 255
EXPIRY_SECONDS = (3600, 2_592_000)
LONGEST_NUMBER = 10
"""Digits. Python refuses to read numbers of some thousands."""


async def receive_file(request: Request, state: ApiState, project_id: str, key_id: str, attempt: Attempt) -> File:
    """Store the uploaded file, or find the one that an earlier try of the request has stored. Blocking work happens in threads.
    Raises BadRequest, InvalidFile, RequestTooLarge."""
    upload = Upload(state)
    reader = MultipartReader(request.headers.get("content-type"), upload)
    try:
        async for chunk in request.stream():
            await state.storage_threads.run(reader.feed, chunk)
        reader.finish()
        return await state.storage_threads.run(upload.finish, project_id, key_id, attempt)
    except AlreadyCreated as earlier:
        return await anyio.to_thread.run_sync(get_file, state, earlier.object_id)
    finally:
        if upload.is_open:
            with anyio.CancelScope(shield=True):  # in a thread, because a bucket has to be told
                await state.storage_threads.run(upload.abort, patient=True)


class Upload:
    """The form's parts, as they come from the MultipartReader."""

    def __init__(self, state: ApiState) -> None:
        self._state = state
        self._file_id = new_id("file")
        self._fields: dict[str, bytes] = {}
        self._part = ""
        self._filename: str | None = None
        self._contents: Contents | None = None

    @property
    def is_open(self) -> bool:
        """Whether storage has been written to, and nothing is committed yet."""
        return self._contents is not None

    def begin_part(self, name: str, filename: str | None) -> None:
        if name in self._fields or (name == "file" and self._contents is not None):
            raise BadRequest(f"{name}: given more than once", code="invalid_multipart", param=name)
        self._part = name
        if name == "file":
            self._filename = _clean_filename(filename)
            self._contents = self._open_contents(self._fields.get("purpose") == b"fine-tune")
        else:
            self._fields[name] = b""

    def part_data(self, data: bytes) -> None:
        if self._part == "file" and self._contents is not None:
            self._contents.write(data)
            return
        self._fields[self._part] += data
        if len(self._fields[self._part]) > MAX_FIELD_BYTES:
            raise BadRequest(f"{self._part}: longer than {MAX_FIELD_BYTES:,} bytes", code="invalid_multipart", param=self._part)

    def end_part(self) -> None:
        if self._part == "purpose":
            self._purpose()

    def finish(self, project_id: str, key_id: str, attempt: Attempt) -> File:
        """Raises AlreadyCreated or AlreadyAnswered where an earlier try has done it; its bytes are the file's then.

        Raises AuthenticationFailed where the key has become invalid since the upload began, which may have been long ago."""
        purpose, lifetime_seconds = self._purpose(), self._lifetime_seconds()
        if self._contents is None or self._filename is None:
            raise BadRequest("file: the form has no such part", code="missing", param="file")
        if purpose == "fine-tune" and not isinstance(self._contents, TrainingContents):
            self._contents = self._checked_again(self._contents)
        compressed = purpose == "fine-tune" and _is_gzip(self._filename)
        stored, example_count = self._contents.commit(), self._contents.example_count
        self._contents = None  # nothing is left to abort
        committing = False
        try:
            now = unix_now()
            file = File(
                id=self._file_id,
                project_id=project_id,
                filename=self._filename[:-3] if compressed else self._filename,
                purpose=purpose,
                size_bytes=stored.size_bytes,
                sha256=stored.sha256,
                storage_key=stored.key,
                example_count=example_count,
                created_at=now,
                expires_at=None if lifetime_seconds is None else now + lifetime_seconds,
            )
            creation = attempt.of_body(self._form_sha256(stored))
            with self._state.database.transaction() as session:
                if key_id not in valid_keys(session, [key_id]):
                    raise AuthenticationFailed("the key of this upload has expired or was revoked, or its project was archived, before its end")
                refuse_repetition(session, creation)
                self._refuse_beyond_the_projects_share(session, project_id, stored.size_bytes)
                session.add(file)
                record_creation(session, creation, file.id, file_object(file))
                committing = True
        except BaseException as error:
            # A commit whose answer got lost may have succeeded: the object stays then, for the row or for the worker's garbage collection.
            if not committing or isinstance(error, StorageFull):
                discard(self._state.storage, stored.key)
            raise
        return file

    def _refuse_beyond_the_projects_share(self, session: Session, project_id: str, size_bytes: int) -> None:
        most = self._state.settings.project_max_file_bytes
        if most:
            session.execute(select(Project.id).where(Project.id == project_id).with_for_update(key_share=True))  # one upload of it at a time
            there: int = session.scalar(select(func.coalesce(func.sum(File.size_bytes), 0)).where(File.project_id == project_id)) or 0
            if there + size_bytes > most:
                message = f"file: the project's files have {there:,} bytes; with this one's {size_bytes:,} they would have more than {most:,}"
                raise BadRequest(f"{message}; delete some first", code="project_storage_full", param="file")

    def abort(self) -> None:
        if self._contents is not None:
            self._contents.abort()

    def _form_sha256(self, stored: StoredObject) -> str:
        """Of the parsed parts: the boundary between them is another one in each try."""
        fields = [sha256_of(name, hashlib.sha256(value).hexdigest()) for name, value in sorted(self._fields.items())]
        return sha256_of(*fields, self._filename or "", stored.sha256)

    def _open_contents(self, for_training: bool) -> Contents:
        settings = self._state.settings
        require_space = partial(require_free_space, settings, self._state.storage)
        require_space()
        writer = self._state.storage.open_writer(f"files/{self._file_id}")
        if for_training:
            return TrainingContents(writer, settings, require_space, compressed=_is_gzip(self._filename or ""))
        return AnyContents(writer, settings.max_file_bytes, require_space)

    def _checked_again(self, contents: Contents) -> Contents:
        """The same bytes through the checks, once the purpose is known."""
        stored = contents.commit()
        checked = self._open_contents(for_training=True)
        try:
            for chunk in verified(self._state.storage.read(stored.key), stored.key, stored.sha256):
                checked.write(chunk)
        except BaseException:
            checked.abort()
            raise
        finally:
            discard(self._state.storage, stored.key)
        return checked

    def _purpose(self) -> str:
        if "purpose" not in self._fields:
            raise BadRequest("purpose: the form has no such part", code="missing", param="purpose")
        purpose = self._fields["purpose"].decode(errors="replace")
        if purpose not in PURPOSES:
            raise BadRequest(f"purpose: {purpose!r} is not one of {', '.join(PURPOSES)}", code="invalid_purpose", param="purpose")
        return purpose

    def _lifetime_seconds(self) -> int | None:
        anchor, seconds = self._fields.get("expires_after[anchor]"), self._fields.get("expires_after[seconds]")
        if anchor is None and seconds is None:
            return None
        if anchor != b"created_at":
            raise BadRequest('expires_after[anchor]: must be "created_at"', code="invalid_value", param="expires_after.anchor")
        fewest, most = EXPIRY_SECONDS
        if seconds is None or not seconds.isdigit() or len(seconds) > LONGEST_NUMBER or not fewest <= int(seconds) <= most:
            message = f"expires_after[seconds]: must be a whole number from {fewest} to {most}"
            raise BadRequest(message, code="invalid_value", param="expires_after.seconds")
        return int(seconds)


def _is_gzip(filename: str) -> bool:
    return filename.lower().endswith(".gz")


def _clean_filename(filename: str | None) -> str:
    """Only ever shown, never used as a path."""
    printable = "".join(character for character in filename or "" if character.isprintable())
    return printable[:MAX_FILENAME_LENGTH] or "upload"
