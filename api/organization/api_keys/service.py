"""Managing the keys of projects: for keys with the scope admin. A revoked key does not exist any more; the audit log knows it."""

from sqlalchemy import Select, select, tuple_
from sqlalchemy.orm import Session

from api.organization.acting_key import lasting_admin_keys, refuse_lockout, require_acting_key
from api.organization.api_keys.schemas import LONGEST_LIFE_SECONDS, CreateApiKey
from api.organization.projects.service import active_project
from api.pagination import unknown_cursor
from api.state import ApiState
from core.audit import Actor
from core.database import unix_now
from core.errors import BadRequest, Conflict, NotFound
from core.projects import create_key, key_id_of, revoke_key
from core.tables.projects import ApiKey


def list_keys(state: ApiState, project_id: str, *, after: str | None, limit: int) -> list[ApiKey]:
    """Up to `limit` + 1 keys, newest first, expired ones too."""
    statement = _keys_of(project_id).order_by(ApiKey.created_at.desc(), ApiKey.id.desc()).limit(limit + 1)
    with state.database.reading() as session:
        if after is not None:
            last = session.scalar(_keys_of(project_id).where(ApiKey.id == after))
            if last is None:
                raise unknown_cursor(after)
            statement = statement.where(tuple_(ApiKey.created_at, ApiKey.id) < tuple_(last.created_at, last.id))
        return list(session.scalars(statement))


def get_key(state: ApiState, project_id: str, key_id: str) -> ApiKey:
    """Raises NotFound, also on another project's."""
    with state.database.reading() as session:
        return _find(session, _keys_of(project_id), key_id)


def create(state: ApiState, actor: Actor, project_id: str, request: CreateApiKey) -> tuple[ApiKey, str]:
    """The key's row, and the key itself. Raises BadRequest on an expiry that can't be, Conflict where the project is archived."""
    expires_at = _expiry(request)
    with state.database.transaction() as session:
        require_acting_key(session, actor)
        active_project(session, project_id)
        plain_key = create_key(session, project_id, request.name, expires_at, request.scopes, actor)
        return session.get_one(ApiKey, key_id_of(plain_key)), plain_key


def revoke(state: ApiState, actor: Actor, project_id: str, key_id: str) -> None:
    """Raises NotFound, and Conflict on the key of the request itself and on the last one that can always make others."""
    with state.database.transaction() as session:
        require_acting_key(session, actor)
        key = _find(session, _keys_of(project_id).with_for_update(), key_id)
        if key.id == actor.key_id:
            raise Conflict("a key can't revoke itself; use another one with the scope admin", code="own_key", param="key_id")
        before = lasting_admin_keys(session)
        revoke_key(session, key, actor)
        refuse_lockout(session, before)


def _keys_of(project_id: str) -> Select[ApiKey]:
    return select(ApiKey).where(ApiKey.project_id == project_id, ApiKey.revoked_at.is_(None))


def _find(session: Session, keys: Select[ApiKey], key_id: str) -> ApiKey:
    key = session.scalar(keys.where(ApiKey.id == key_id))
    if key is None:
        raise NotFound(f"No such API key in this project: {key_id}", code="api_key_not_found", param="key_id")
    return key


def _expiry(request: CreateApiKey) -> float | None:
    now = unix_now()
    if request.expires_in_seconds is not None and request.expires_at is not None:
        raise BadRequest("expires_at: give this or expires_in_seconds, not both", code="invalid_value", param="expires_at")
    if request.expires_at is not None and not now < request.expires_at <= now + LONGEST_LIFE_SECONDS:
        raise BadRequest("expires_at: must be in the future, within ten years, in unix seconds", code="invalid_value", param="expires_at")
    return request.expires_at if request.expires_in_seconds is None else now + request.expires_in_seconds
