"""A body of nothing but wrong items: pydantic describes each error, so the number of errors is what such a body costs."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel, TypeAdapter, ValidationError

from api.app import app
from api.completions.schemas import ChatRequest, CompletionRequest
from api.error_handlers import MAX_ERRORS_READ, bad_request
from api.fine_tuning.jobs.schemas import CreateJob
from api.organization.api_keys.schemas import CreateApiKey
from api.webhooks import schemas as webhooks
from api.webhooks.schemas import CreateEndpoint, RotateSecret, UpdateEndpoint
from inference import schemas as inference
from inference.routes import router as inference_router

MANY = 20_000
MOST_ERRORS = 8
CHAT: dict[str, Any] = {"model": "x", "messages": [{"role": "user", "content": "hi"}]}
JOB = {"model": "x", "training_file": "file-1"}
ENDPOINT = {"name": "x", "url": "https://example.com", "event_types": ["fine_tuning.job.failed"]}
BODIES: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (ChatRequest, CHAT | {"messages": [0] * MANY}),
    (ChatRequest, CHAT | {"messages": [{"role": "assistant", "tool_calls": [0] * MANY}]}),
    (ChatRequest, CHAT | {"messages": [{"role": "user", "content": [0] * MANY}]}),
    (ChatRequest, CHAT | {"stop": [0] * MANY}),
    (ChatRequest, CHAT | {"tools": [0] * MANY}),
    (ChatRequest, CHAT | {"logit_bias": {str(token): "x" for token in range(MANY)}}),
    (CompletionRequest, {"model": "x", "prompt": [-1] * MANY}),
    (CompletionRequest, {"model": "x", "prompt": [[-1] * 10] * MANY}),
    (CompletionRequest, {"model": "x", "prompt": [[-1] * MANY]}),
    (CreateJob, JOB | {"metadata": {str(number): 0 for number in range(MANY)}}),
    (CreateApiKey, {"name": "x", "scopes": [0] * MANY}),
    (CreateEndpoint, ENDPOINT | {"event_types": [0] * MANY}),
    (CreateEndpoint, ENDPOINT | {str(number): 0 for number in range(MANY)}),
    (UpdateEndpoint, {str(number): 0 for number in range(MANY)}),
    (RotateSecret, {str(number): 0 for number in range(MANY)}),
    (webhooks.TestEndpoint, {str(number): 0 for number in range(MANY)}),
    (inference.ChatCompletionRequest, CHAT | {"messages": [0] * MANY}),
    (inference.ChatCompletionRequest, CHAT | {"messages": [{"role": "user", "content": [0] * MANY}]}),
    (inference.ChatCompletionRequest, CHAT | {"tools": [0] * MANY}),
    (inference.ChatCompletionRequest, CHAT | {"stop": [0] * MANY}),
    (inference.ChatCompletionRequest, CHAT | {"stop_token_ids": [-1] * MANY}),
    (inference.ChatCompletionRequest, CHAT | {"logit_bias": {str(token): "x" for token in range(MANY)}}),
    (inference.CompletionRequest, {"model": "x", "prompt": [-1] * MANY}),
    (inference.CompletionRequest, {"model": "x", "prompt": [[-1] * MANY]}),
]


@pytest.mark.parametrize(("schema", "body"), BODIES, ids=[f"{schema.__name__}-{list(body)[-1][:12]}" for schema, body in BODIES])
def test_many_wrong_items_are_few_errors(schema: type[BaseModel], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        schema.model_validate(body)
    assert 1 <= caught.value.error_count() <= MOST_ERRORS


def test_every_list_of_a_request_ends_at_its_first_error() -> None:
    """Of any route of both servers, so that a new field can't be forgotten."""
    inference_app = FastAPI()
    inference_app.include_router(inference_router)
    bodies = [annotation for application in (app, inference_app) for annotation in body_types(application)]
    assert {ChatRequest, CreateJob, CreateEndpoint, inference.ChatCompletionRequest} <= set(bodies)
    for annotation in bodies:
        lists = list(lists_in(TypeAdapter(annotation).core_schema, str(annotation)))
        assert [place for place, schema in lists if not schema.get("fail_fast")] == []


def body_types(application: FastAPI) -> Iterator[Any]:
    for route in iter_route_contexts(application.routes):
        dependant = getattr(route, "dependant", None)
        if dependant is not None:
            yield from (field.field_info.annotation for field in dependant.body_params)


def lists_in(schema: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(schema, dict):
        if schema.get("type") in ("list", "set", "tuple") and schema.get("items_schema", {}).get("type", "any") != "any":
            yield place, schema
        for name, part in schema.items():
            if name not in ("metadata", "definitions"):  # the latter: JsonValue's own, which every body fits
                yield from lists_in(part, f"{place}.{name}")
    elif isinstance(schema, list | tuple):
        for part in schema:
            yield from lists_in(part, place)


class CountedErrors(Sequence[Any]):
    def __init__(self) -> None:
        self.read = 0

    def __len__(self) -> int:
        return MANY

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(MANY))]
        if index >= MANY:
            raise IndexError(index)
        self.read += 1
        return {"type": "int_type", "loc": (index,), "msg": "Input should be an integer"}


def test_few_errors_are_read() -> None:
    errors = CountedErrors()
    assert bad_request(errors, [None] * MANY, "numbers").param == "numbers.0"
    assert errors.read <= 2 * MAX_ERRORS_READ
