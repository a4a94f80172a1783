"""Files on the wire."""

from typing import Literal, get_args

from pydantic import BaseModel

from api.pagination import Identified
from core.tables.files import File

Purpose = Literal["fine-tune", "evals", "user_data", "batch", "assistants", "vision"]
PURPOSES: tuple[str, ...] = get_args(Purpose)


class FileObject(Identified):
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    """Bytes are checked while they arrive, so a file that exists is processed."""
    expires_at: int | None
    status_details: None = None


class DeletedFile(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: bool


def file_object(file: File) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.size_bytes,
        created_at=int(file.created_at),
        filename=file.filename,
        purpose=file.purpose,
        expires_at=None if file.expires_at is None else int(file.expires_at),
    )
