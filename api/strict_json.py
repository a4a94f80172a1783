"""JSON as the standard has it: NaN, infinities, half surrogate pairs and endless nesting are refused where they arrive."""

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import AfterValidator, Field
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


def _without_nul(value: str) -> str:
    if "\x00" in value:
        raise PydanticCustomError("invalid_text", "the text holds a NUL character")
    return value


WITHOUT_NUL = AfterValidator(_without_nul)
"""For text that ends up in a database: Postgres has no NUL. Stands after a Field with limits."""
ObjectId = Annotated[str, Field(max_length=512), WITHOUT_NUL]
"""Names an object; long enough for every id that is made here."""
