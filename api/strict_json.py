"""JSON as the standard has it: NaN, infinities, half surrogate pairs and endless nesting are refused where they arrive.

Every list and object of a request also has a bound on the errors that it may cause: pydantic describes each wrong item, and a body
of nothing else would keep the event loop busy for minutes.
"""

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException

from sdft_engine.contract.strict_json import MAX_JSON_DEPTH, is_deeper


class JsonTooDeep(HTTPException):
    """The one kind of exception that FastAPI lets pass while it reads a body."""

    def __init__(self) -> None:
        super().__init__(400, f"the body is JSON nested deeper than {MAX_JSON_DEPTH} levels")


class StrictJsonRequest(Request):
    async def json(self) -> Any:
        """Raises JsonTooDeep, and json.JSONDecodeError, which FastAPI turns into a 400."""
        try:
            value = orjson.loads(await self.body())
        except orjson.JSONDecodeError as error:
            if error.msg == "depth limit exceeded":
                raise JsonTooDeep from error
            raise
        if is_deeper(value, MAX_JSON_DEPTH):
            raise JsonTooDeep
        return value


class StrictJsonRoute(APIRoute):
    """Routes with a JSON body: `APIRouter(route_class=StrictJsonRoute)`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(StrictJsonRequest(request.scope, request.receive))

        return handle_strictly


FIRST_ERROR_ENDS = Field(fail_fast=True)
"""For lists: what follows the first wrong item is not looked at."""
MAX_FIELDS = 64
"""Of an object all of whose fields are known: more than any has."""


def at_most(entries: int) -> BeforeValidator:
    """For objects with free names. `Field(max_length=…)` counts only after every entry has been read."""

    def count(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > entries:
            raise PydanticCustomError("too_long", "may have at most {most} entries, not {found}", {"most": entries, "found": len(value)})
        return value

    return BeforeValidator(count)


class KnownFields(BaseModel):
    """A request's body in which unknown fields are refused."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _few_enough(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise PydanticCustomError("too_long", "the body has {found} fields, and most of them are unknown", {"found": len(value)})
        return value


def _without_nul(value: str) -> str:
    if "\x00" in value:
        raise PydanticCustomError("invalid_text", "the text holds a NUL character")
    return value


WITHOUT_NUL = AfterValidator(_without_nul)
"""For text that ends up in a database: Postgres has no NUL. Stands after a Field with limits."""
ObjectId = Annotated[str, Field(max_length=512), WITHOUT_NUL]
"""Names an object; long enough for every id that is made here."""
