"""An inference server at the edge of the gateway's tests: real HTTP, canned text, and ways to misbehave."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.fixtures.scripted_model import logps

ADAPTER = 7
"""Every adapter's state: see tests/fixtures/scripted_model.py."""
WORDS = ("The ", "tank ", "is full ✓.")


@dataclass
class InferenceStub:
    """`misbehaviour` answers a chat instead of the stub, where it is set."""

    base_model: str = "tiny"
    loaded: set[str] = field(default_factory=set)
    load_paths: list[str] = field(default_factory=list)
    """Two for a model that is proved: under a name on trial first, and then its own."""
    unloaded: list[str] = field(default_factory=list)
    chats: list[dict[str, Any]] = field(default_factory=list)
    scored: list[str] = field(default_factory=list)
    """Models that were asked for log-probabilities of a prompt, as a proof that they are served as trained."""
    score_seconds: float = 0
    breaks_scores: bool = False
    ignores_adapters: bool = False
    answered: dict[str, int] = field(default_factory=dict)
    """Answers by the model's name."""
    misbehaviour: Callable[[Request], Response] | None = None
    refuses_loads: str | None = None
    refusal_status: int = 400
    healthy: bool = True
    refuses_key: bool = False
    load_seconds: float = 0
    endless: bool = False
    cancelled: int = 0
    running: int = 0

    def application(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/health", lambda request: PlainTextResponse("", 200 if self.healthy else 503)),
                Route("/v1/load_lora_adapter", self._load, methods=["POST"]),
                Route("/v1/unload_lora_adapter", self._unload, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/v1/models", self._models),
            ]
        )

    async def _models(self, request: Request) -> Response:
        return _error(401, "Unauthorized") if self.refuses_key else JSONResponse({"data": [{"id": self.base_model}]})

    async def _load(self, request: Request) -> Response:
        body = await request.json()
        await asyncio.sleep(self.load_seconds)
        self.load_paths.append(body["lora_path"])
        if self.refuses_loads:
            return _error(self.refusal_status, self.refuses_loads)
        self.loaded.add(body["lora_name"])
        return JSONResponse({})

    async def _unload(self, request: Request) -> Response:
        name = (await request.json())["lora_name"]
        self.unloaded.append(name)
        self.loaded.discard(name)
        return JSONResponse({})

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        if not (body.get("echo") and body.get("temperature") == 0):
            return await self._chat(request)
        self.scored.append(body["model"])
        await asyncio.sleep(self.score_seconds)
        if self.breaks_scores:
            return _error(500, "as the test says")
        state = ADAPTER if body["model"] in self.loaded and not self.ignores_adapters else None
        return JSONResponse({"choices": [{"logprobs": {"token_logprobs": [None, *logps(state, body["prompt"]), -1.0]}}]})

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        self.chats.append(body)
        if self.misbehaviour is not None:
            return self.misbehaviour(request)
        if body["model"] not in (self.base_model, *self.loaded):
            return _error(404, f"The model `{body['model']}` does not exist.")
        self.answered[body["model"]] = self.answered.get(body["model"], 0) + 1
        if body.get("stream"):
            return StreamingResponse(self._stream(body), media_type="text/event-stream")
        if self.endless:
            await self._until_cancelled(request)
        choice = {"index": 0, "message": {"role": "assistant", "content": "".join(WORDS)}, "text": "".join(WORDS), "finish_reason": "stop"}
        return JSONResponse({**_head(body), "choices": [choice], "usage": USAGE})

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        head = _head(body)
        self.running += 1
        try:
            for word in WORDS:
                yield event({**head, "choices": [{"index": 0, "delta": {"content": word}, "text": word}]})
            while self.endless:
                yield event({**head, "choices": [{"index": 0, "delta": {"content": "on "}}]})
                await asyncio.sleep(0.02)
            if (body.get("stream_options") or {}).get("include_usage"):
                yield event({**head, "choices": [], "usage": USAGE})
            yield b"data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def _until_cancelled(self, request: Request) -> None:
        self.running += 1
        while not await request.is_disconnected():
            await asyncio.sleep(0.02)
        self.running -= 1
        self.cancelled += 1


USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}


def event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()


def _head(body: dict[str, Any]) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk" if body.get("stream") else "chat.completion", "created": 1, "model": body["model"]}


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": status}}, status)
