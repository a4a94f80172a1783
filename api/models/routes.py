"""Ids of tuned models hold colons and, percent-encoded, slashes; so the path of a model takes everything, and the longer
route comes first."""

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from api.byte_ranges import stored_object_response
from api.models import service
from api.models.exports import stored_export
from api.models.schemas import AdapterFormat, DeletedModel, ModelList, ModelObject
from api.state import ProjectId, RequestActor, State

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
def list_models(state: State, project_id: ProjectId) -> ModelList:
    return ModelList(data=service.list_models(state, project_id))


@router.head("/{model_id:path}/adapter", include_in_schema=False)
@router.get("/{model_id:path}/adapter", response_class=StreamingResponse)
async def download_adapter(model_id: str, state: State, project_id: ProjectId, request: Request, format: AdapterFormat = "peft") -> Response:
    model = await to_thread.run_sync(service.get_tuned_model, state, project_id, model_id)
    stored = service.stored_adapter(model) if format == "peft" else await stored_export(state, model, format)
    return await stored_object_response(request, state, stored, filename=service.archive_name(model, format), media_type="application/gzip")


@router.get("/{model_id:path}")
def get_model(model_id: str, state: State, project_id: ProjectId) -> ModelObject:
    return service.get_model(state, project_id, model_id)


@router.delete("/{model_id:path}")
async def delete_model(model_id: str, state: State, project_id: ProjectId, actor: RequestActor) -> DeletedModel:
    model = await to_thread.run_sync(service.get_tuned_model, state, project_id, model_id)
    await state.deletion_threads.run(service.delete_model, state, model, actor)
    return DeletedModel(id=model_id, deleted=True)
