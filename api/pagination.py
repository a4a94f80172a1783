"""Pages as the OpenAI client walks them: `after` is the id of the last object it has, `has_more` whether to go on."""

from collections.abc import Sequence
from typing import Annotated, Generic, Literal, TypeVar

from fastapi import Query
from pydantic import BaseModel

from core.errors import BadRequest
from sdft_engine.contract.quoting import quoted


class Identified(BaseModel):
    id: str


Item = TypeVar("Item", bound=Identified)
After = Annotated[str | None, Query(description="Id of the last object of the page before.")]


class Page(BaseModel, Generic[Item]):
    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


def page_of(items: Sequence[Item], limit: int | None = None) -> Page[Item]:
    """A page of at most `limit` items, from a query that asked for one more than that to see whether there are more."""
    shown = list(items if limit is None else items[:limit])
    return Page(
        data=shown,
        first_id=shown[0].id if shown else None,
        last_id=shown[-1].id if shown else None,
        has_more=len(shown) < len(items),
    )


def unknown_cursor(after: str) -> BadRequest:
    return BadRequest(f"after: there is no object with the id {quoted(after)} in this list", code="invalid_cursor", param="after")
