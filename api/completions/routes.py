from fastapi import APIRouter, Request, Response

from api.completions.gateway import answer
from api.completions.schemas import ChatRequest, CompletionRequest
from api.state import KeyId, ProjectId, State
from api.strict_json import StrictJsonRoute

router = APIRouter(prefix="/v1", tags=["inference"], route_class=StrictJsonRoute)


@router.post("/chat/completions")
async def create_chat_completion(wanted: ChatRequest, request: Request, state: State, project_id: ProjectId, key_id: KeyId) -> Response:
    return await answer(request, state, project_id, key_id, "/v1/chat/completions", wanted)


@router.post("/completions")
async def create_completion(wanted: CompletionRequest, request: Request, state: State, project_id: ProjectId, key_id: KeyId) -> Response:
    return await answer(request, state, project_id, key_id, "/v1/completions", wanted)
