"""A project's API keys on the wire, as OpenAI's administration has them."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.pagination import Identified
from api.strict_json import FIRST_ERROR_ENDS, WITHOUT_NUL
from core.projects import PROJECT_SCOPES
from core.tables.projects import ApiKey, Scope

LONGEST_LIFE_SECONDS = 10 * 365 * 86_400


class CreateApiKey(BaseModel):
    model_config = ConfigDict(strict=True)

    name: Annotated[str, Field(min_length=1, max_length=100), WITHOUT_NUL]
    scopes: Annotated[list[Scope], FIRST_ERROR_ENDS, Field(min_length=1)] = list(PROJECT_SCOPES)
    expires_in_seconds: Annotated[int, Field(ge=1, le=LONGEST_LIFE_SECONDS)] | None = None
    expires_at: int | None = None
    """Unix seconds; or `expires_in_seconds`; or neither."""


class ApiKeyObject(Identified):
    object: Literal["organization.project.api_key"] = "organization.project.api_key"
    name: str
    redacted_value: str
    created_at: int
    last_used_at: int | None
    """To the minute."""
    expires_at: int | None
    scopes: list[str]
    project_id: str


class CreatedApiKey(ApiKeyObject):
    value: str
    """The key itself, which nobody is told again."""


class DeletedApiKey(BaseModel):
    id: str
    object: Literal["organization.project.api_key.deleted"] = "organization.project.api_key.deleted"
    deleted: bool


def api_key_object(key: ApiKey) -> ApiKeyObject:
    return ApiKeyObject(
        id=key.id,
        name=key.name,
        redacted_value=f"sdft_{key.id}_...",
        created_at=int(key.created_at),
        last_used_at=None if key.last_used_at is None else int(key.last_used_at),
        expires_at=None if key.expires_at is None else int(key.expires_at),
        scopes=key.scopes,
        project_id=key.project_id,
    )
