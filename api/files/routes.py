from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from api.byte_ranges import stored_object_response
from api.files import service
from api.files.dependencies import OwnedFile
from api.files.schemas import DeletedFile, FileObject, file_object
from api.files.upload import receive_file
from api.idempotency import CreationAttempt
from api.pagination import After, Page, page_of
from api.state import KeyId, ProjectId, RequestActor, State
from core.storage import StoredObject

router = APIRouter(prefix="/v1/files", tags=["files"])


@router.post("")
async def create_file(request: Request, state: State, project_id: ProjectId, key_id: KeyId, attempt: CreationAttempt) -> FileObject:
    return file_object(await receive_file(request, state, project_id, key_id, attempt))


@router.get("")
def list_files(
    state: State,
    project_id: ProjectId,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> Page[FileObject]:
    files = service.list_files(state, project_id, after=after, limit=limit, newest_first=order == "desc", purpose=purpose)
    return page_of([file_object(file) for file in files], limit)


@router.get("/{file_id}")
async def get_file(file: OwnedFile) -> FileObject:
    return file_object(file)


@router.head("/{file_id}/content", include_in_schema=False)
@router.get("/{file_id}/content", response_class=StreamingResponse)
async def get_file_content(file: OwnedFile, state: State, request: Request) -> Response:
    stored = StoredObject(file.storage_key, file.size_bytes, file.sha256)
    return await stored_object_response(request, state, stored, filename=file.filename, media_type="application/octet-stream")


@router.delete("/{file_id}")
async def delete_file(file: OwnedFile, state: State, actor: RequestActor) -> DeletedFile:
    await state.storage_threads.run(service.delete_file, state, file, actor)
    return DeletedFile(id=file.id, deleted=True)
