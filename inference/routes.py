"""The routes: vLLM's surface, as far as it is needed here."""

import time
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from inference.answers import Piece, collect, pieces_of
from inference.chat import chat_chunks, chat_completion, prepare_chat
from inference.completions import Completion, completion_chunks, prepare_completion, text_completion
from inference.connections import EventStream, begun, unless_client_leaves
from inference.sampling import Server
from inference.schemas import ChatCompletionRequest, CompletionRequest, LoadAdapterRequest, UnloadAdapterRequest, refuse_unsupported
from inference.submission import Submission
from sdft_engine.model import dtype_name

router = APIRouter()
STARTED_AT = int(time.time())


def server_of(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


ServerOfApp = Annotated[Server, Depends(server_of)]


@router.get("/health")
async def health(server: ServerOfApp) -> Response:
    """200 while the engine answers; 503 once only a restart helps."""
    return Response(status_code=200 if server.engine.healthy else 503)


@router.get("/v1/models")
async def models(server: ServerOfApp) -> dict[str, Any]:
    def card(name: str, root: str, parent: str | None, created: int) -> dict[str, Any]:
        numbers = {"max_model_len": server.chat_format.context_length, "dtype": dtype_name(server.engine.model.dtype)}
        return {"id": name, "object": "model", "created": created, "owned_by": "sdft", "root": root, "parent": parent, **numbers}

    base = card(server.base_model_id, server.base_model_id, None, STARTED_AT)
    adapters = [card(a.name, str(a.directory), server.base_model_id, a.loaded_at) for a in server.adapters.loaded.values()]
    return {"object": "list", "data": [base, *adapters]}


@router.post("/v1/load_lora_adapter")
async def load_lora_adapter(server: ServerOfApp, body: LoadAdapterRequest) -> Response:
    await server.adapters.load(body.lora_name, body.lora_path)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(server: ServerOfApp, body: UnloadAdapterRequest) -> Response:
    await server.adapters.unload(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, server: ServerOfApp, body: ChatCompletionRequest) -> Response:
    refuse_unsupported(body)
    submission, answers = await prepare_chat(server, body)
    prompt_tokens = len(submission.sequences[0].prompt_ids)
    server.engine.submit(submission)
    pieces = pieces_of(submission, answers)
    if body.stream:
        first: Piece = await unless_client_leaves(request, anext(pieces))  # a failure before the first token still has a status
        return EventStream(chat_chunks(server, body, begun(first, pieces), answers, prompt_tokens), submission.cancel)
    async with aclosing(pieces):
        finished = await unless_client_leaves(request, collect(pieces, len(answers)))
    return JSONResponse(chat_completion(server, body, finished, (prompt_tokens, sum(answer.token_count for answer in answers))))


@router.post("/v1/completions")
async def completions(request: Request, server: ServerOfApp, body: CompletionRequest) -> Response:
    refuse_unsupported(body)
    completion = await unless_client_leaves(request, prepare_completion(server, body))
    if completion.submission is not None:
        server.engine.submit(completion.submission)
    pieces = completion.pieces()
    if body.stream:
        first = await unless_client_leaves(request, anext(pieces))
        return EventStream(completion_chunks(server, body, completion, begun(first, pieces)), lambda: cancel(completion))
    async with aclosing(pieces):
        finished = await unless_client_leaves(request, collect(pieces, len(completion.prompts) * (body.n or 1)))
    return JSONResponse(text_completion(server, body, finished, completion.counts))


def cancel(completion: Completion) -> None:
    submission: Submission | None = completion.submission
    if submission is not None:
        submission.cancel()
