"""Ids of tuned models hold colons and, percent-encoded, slashes; so the path of a model takes everything, and the longer
route comes first."""

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from api.byte_ranges import stored_object_response
from api.models import service
from api.models.schemas import AdapterFormat, DeletedModel, ModelList, ModelObject
from api.state import ProjectId, State
from core.errors import BadRequest
from core.storage import StoredObject

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
def list_models(state: State, project_id: ProjectId) -> ModelList:
    return ModelList(data=service.list_models(state, project_id))


@router.get("/{model_id:path}/adapter")
def download_adapter(model_id: str, state: State, project_id: ProjectId, request: Request, format: AdapterFormat = "peft") -> StreamingResponse:
    if format != "peft":
        raise BadRequest(f"format: {format!r} is not yet available in this version; use peft", code="not_yet_available", param="format")
    model = service.get_tuned_model(state, project_id, model_id)
    stored = StoredObject(model.storage_key, model.archive_bytes, model.archive_sha256)
    return stored_object_response(request, state.storage, stored, filename=service.archive_name(model), media_type="application/gzip")


@router.get("/{model_id:path}")
def get_model(model_id: str, state: State, project_id: ProjectId) -> ModelObject:
    return service.get_model(state, project_id, model_id)


@router.delete("/{model_id:path}")
def delete_model(model_id: str, state: State, project_id: ProjectId) -> DeletedModel:
    service.delete_model(state, service.get_tuned_model(state, project_id, model_id))
    return DeletedModel(id=model_id, deleted=True)
