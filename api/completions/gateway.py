"""Between the clients and the inference server: names are mapped, missing adapters loaded, errors translated.

No database session is held while the inference server works. A client that leaves cancels its request there.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, AsyncExitStack
from typing import Any, TypeVar

import anyio.to_thread
import orjson
from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from api.completions.schemas import SamplingRequest
from api.completions.served_models import ServedModel, find_served_model
from api.completions.streamed_answer import StreamedAnswer
from api.completions.upstream_errors import translated
from api.state import ApiState
from core.errors import InferenceFailed, InferenceUnavailable
from core.inference_client import KEY_REFUSED_STATUSES, InferenceAnswer, InferenceClient
from core.logging import get_logger

NOT_HERE = (*KEY_REFUSED_STATUSES, 502, 503, 504)
"""Statuses of a server that can't answer at the moment or has another key, or of a proxy before one that is away: another may."""
Result = TypeVar("Result")
log = get_logger(__name__)


async def answer(request: Request, state: ApiState, project_id: str, key_id: str, path: str, wanted: SamplingRequest) -> Response:
    """The inference server's answer at `path`, whole or streamed, under the model's public id. Raises RateLimited where the key has too
    many answers in work."""
    model = await anyio.to_thread.run_sync(find_served_model, state, project_id, wanted.model)
    body = wanted.forwarded(model.serving_name)
    if model.temperature is not None:
        body.setdefault("temperature", model.temperature)
    held = state.answers_of_keys.held(key_id, wanted.answers)
    if wanted.stream:
        return await _unless_disconnected(request, _streamed(state, model, path, body, held))
    with held:
        return JSONResponse(await _unless_disconnected(request, _whole(state, model, path, body)))


async def _whole(state: ApiState, model: ServedModel, path: str, body: dict[str, Any]) -> dict[str, Any]:
    async def ask(client: InferenceClient) -> InferenceAnswer:
        found = await client.complete(path, body)
        if found.status == 404 and model.adapter is not None:
            await state.adapter_loading.load(model.adapter, client)
            found = await client.complete(path, body)
        if found.status in NOT_HERE:
            raise translated(found.status, found.body, model)
        return found

    found = await _first_answer(state, model, ask)
    if found.status != 200:
        raise translated(found.status, found.body, model)
    return {**found.body, "model": model.public_id}


async def _streamed(state: ApiState, model: ServedModel, path: str, body: dict[str, Any], held: AbstractContextManager[None]) -> Response:
    """Returns once an inference server has accepted the request, so that a refusal still gets its own status."""

    async def ask(client: InferenceClient) -> tuple[int, AsyncIterator[bytes]]:
        status, chunks = await opened.enter_async_context(client.stream(path, body))
        if status == 404 and model.adapter is not None:
            await opened.aclose()
            await state.adapter_loading.load(model.adapter, client)
            status, chunks = await opened.enter_async_context(client.stream(path, body))
        if status in NOT_HERE:
            error = translated(status, await _json_of(chunks), model)
            await opened.aclose()
            raise error
        return status, chunks

    async with AsyncExitStack() as ended, AsyncExitStack() as opened:
        ended.enter_context(held)
        status, chunks = await _first_answer(state, model, ask)
        if status != 200:
            raise translated(status, await _json_of(chunks), model)
        ended.push_async_exit(opened.pop_all())
        return StreamedAnswer(chunks, model, ended.pop_all())


async def _first_answer(state: ApiState, model: ServedModel, ask: Callable[[InferenceClient], Awaitable[Result]]) -> Result:
    """What the first server says that can be reached and serves the model. Raises what the last one raised where none does."""
    *others, last = state.inference.in_order(model.serving_name)
    for client in others:
        try:
            return await ask(client)
        except (InferenceUnavailable, InferenceFailed) as error:
            log.warning("asking_another_server", model=model.public_id, server=client.url, error=error.message)
    return await ask(last)


async def _json_of(chunks: AsyncIterator[bytes]) -> Any:
    text = b"".join([chunk async for chunk in chunks])
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return {"message": text[:500].decode(errors="replace")}


async def _unless_disconnected(request: Request, work: Awaitable[Result]) -> Result:
    """The work's result; the work is cancelled where the client leaves first. Raises ClientDisconnect then."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_client_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _client_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
