"""The key of a request that manages projects or keys, asked for again in the transaction of the change.

The authentication remembers keys for some seconds, and that is long enough for a revoked one to make itself another.
"""

from sqlalchemy import select
from sqlalchemy.orm import Session

from core.audit import Actor
from core.errors import AuthenticationFailed, Conflict
from core.projects import FIRST_PROJECT, valid_keys
from core.tables.projects import ApiKey, Project


def require_acting_key(session: Session, actor: Actor) -> None:
    """Raises AuthenticationFailed where the key has been revoked or has expired meanwhile. First in a transaction: it lets one change of
    this kind happen at a time, so that two keys that revoke each other don't both succeed."""
    session.execute(select(Project.id).where(Project.name == FIRST_PROJECT).with_for_update())
    if actor.key_id is not None and actor.key_id not in valid_keys(session, [actor.key_id]):
        raise AuthenticationFailed("The API key of this request has been revoked or has expired.", headers={"www-authenticate": "Bearer"})


def lasting_admin_keys(session: Session) -> set[str]:
    """Keys with the scope admin that never expire."""
    lasting = select(ApiKey.id, ApiKey.scopes).where(ApiKey.expires_at.is_(None), ApiKey.revoked_at.is_(None))
    with_admin = {row.id for row in session.execute(lasting) if "admin" in row.scopes}
    return valid_keys(session, with_admin)


def refuse_lockout(session: Session, before: set[str]) -> None:
    """Raises Conflict where the change of this transaction ended the last of the `lasting_admin_keys`."""
    session.flush()
    if before and not lasting_admin_keys(session):
        message = "no key with the scope admin that never expires would be left; make another one first"
        raise Conflict(message, code="last_admin_key")
