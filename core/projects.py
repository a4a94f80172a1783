"""Projects and the keys that open them: made, found and ended. Every change is in the audit log.

A key is `sdft_<id>_<secret><checksum>`: 8 characters that name its row, 43 that are secret (256 bits), and 6 that catch a
mistyped or invented key before the database is asked. Only the SHA-256 of the whole key is kept.
"""

import hashlib
import hmac
import os
import re
import secrets
import string
import zlib
from collections.abc import Iterable
from pathlib import Path

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from core.audit import SERVER, Actor, record
from core.database import Database, insert_for, unix_now
from core.durable_files import rename_durably
from core.errors import BadRequest
from core.ids import new_id, new_token
from core.tables.projects import SCOPES, ApiKey, Project, Scope

FIRST_PROJECT = "default"
ALPHABET = string.digits + string.ascii_letters
KEY = re.compile(r"(sdft_([0-9A-Za-z]{8})_[0-9A-Za-z]{43})([0-9A-Za-z]{6})")
PROJECT_SCOPES: tuple[Scope, ...] = ("read", "write", "infer")
"""Everything within one project: what a key may do unless it is said otherwise."""
PROJECT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def create_project(session: Session, name: str, *, max_running_jobs: int | None = None, actor: Actor = SERVER) -> Project:
    """A new project. Its name becomes part of its models' names. Raises BadRequest on a name that can't be that, and
    sqlalchemy's IntegrityError on one that is taken."""
    project = Project(id=new_id("proj"), name=valid_project_name(name), created_at=unix_now(), max_running_jobs=max_running_jobs)
    session.add(project)
    session.flush()
    record(session, actor, "project.created", project_id=project.id, object_id=project.id, data={"name": name})
    return project


def valid_project_name(name: str) -> str:
    if not PROJECT_NAME.fullmatch(name):
        message = "a project's name has 1 to 64 letters, digits, dashes and underscores, starting with a letter or digit"
        raise BadRequest(message, code="invalid_project_name", param="name")
    return name


def archive_project(session: Session, project: Project, actor: Actor) -> None:
    """Its keys open nothing from now on. Its objects stay, and its jobs go on."""
    project.archived_at = unix_now()
    record(session, actor, "project.archived", project_id=project.id, object_id=project.id)


def create_key(
    session: Session, project_id: str, name: str, expires_at: float | None = None, scopes: Iterable[Scope] = PROJECT_SCOPES, actor: Actor = SERVER
) -> str:
    """A new key of the project, in plain: this is the only time that anyone sees it. `expires_at` in unix seconds."""
    key_id = "".join(secrets.choice(ALPHABET) for _ in range(8))
    secret = "".join(secrets.choice(ALPHABET) for _ in range(43))
    named = f"sdft_{key_id}_{secret}"
    plain_key = named + _checksum(named)
    granted = [scope for scope in SCOPES if scope in set(scopes)]
    key = ApiKey(id=key_id, project_id=project_id, name=name, key_sha256=_digest(plain_key), scopes=granted, created_at=unix_now(), expires_at=expires_at)
    session.add(key)
    session.flush()
    record(session, actor, "api_key.created", project_id=project_id, object_id=key_id, data={"name": name, "scopes": granted})
    return plain_key


def key_id_of(plain_key: str) -> str:
    """The public part of a key that was made here."""
    return plain_key.split("_")[1]


def revoke_key(session: Session, key: ApiKey, actor: Actor) -> None:
    """It opens nothing from now on; API processes that have just seen it notice within seconds."""
    key.revoked_at = unix_now()
    record(session, actor, "api_key.deleted", project_id=key.project_id, object_id=key.id)


def find_key(session: Session, plain_key: str) -> ApiKey | None:
    """The row of a valid key; None where it is malformed, unknown, expired or revoked, or its project is archived."""
    parts = KEY.fullmatch(plain_key)
    if parts is None or not hmac.compare_digest(_checksum(parts[1]), parts[3]):
        return None
    found = session.execute(select(ApiKey, Project.archived_at).join(Project).where(ApiKey.id == parts[2])).one_or_none()
    if found is None or not hmac.compare_digest(found.ApiKey.key_sha256, _digest(plain_key)):
        return None
    key: ApiKey = found.ApiKey
    if found.archived_at is not None or key.revoked_at is not None or (key.expires_at is not None and key.expires_at <= unix_now()):
        return None
    return key


def valid_keys(session: Session, key_ids: Iterable[str]) -> set[str]:
    """Those of the keys that are neither expired nor revoked, nor of an archived project."""
    unexpired = or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > unix_now())
    alive = select(ApiKey.id).join(Project, Project.id == ApiKey.project_id).where(Project.archived_at.is_(None), ApiKey.revoked_at.is_(None), unexpired)
    return set(session.scalars(alive.where(ApiKey.id.in_(list(key_ids)))))


def ensure_first_key(database: Database, path: Path) -> str | None:
    """On a database without projects: create the first project and a key for it, and write the key to `path` (mode 0600).

    Returns the key, or None where a project exists already. Of several processes that do this at once, one succeeds.
    """
    with database.transaction() as session:
        if session.scalar(select(Project.id).limit(1)) is not None:
            return None
        project = insert_for(session, Project).values(id=new_id("proj"), name=FIRST_PROJECT, created_at=unix_now())
        project_id = session.scalar(project.on_conflict_do_nothing(index_elements=["name"]).returning(Project.id))
        if project_id is None:
            return None
        record(session, SERVER, "project.created", project_id=project_id, object_id=project_id, data={"name": FIRST_PROJECT})
        plain_key = create_key(session, project_id, "first key", scopes=SCOPES)
        _write_private(path, plain_key + "\n")  # before the commit: a key that nobody has been told would lock everyone out
        return plain_key


def replace_lost_key(database: Database, path: Path) -> str | None:
    """Where `path` is missing, or its key was never known (it is written before the commit, which may have failed): one more key for the
    first project, written there as the first one was. Older keys stay valid, and one that was revoked is not replaced.

    Returns the key, or None where the file's key is known, or no first project. Of several processes that do this at once, one succeeds.
    """
    with database.transaction() as session:
        project_id = session.scalar(select(Project.id).where(Project.name == FIRST_PROJECT).with_for_update())
        if project_id is None or (path.exists() and _may_be_known(session, path.read_text().strip())):
            return None
        plain_key = create_key(session, project_id, "instead of a lost key", scopes=SCOPES)
        _write_private(path, plain_key + "\n")
        return plain_key


def _may_be_known(session: Session, plain_key: str) -> bool:
    """False for a key that could have been made here, and has no row."""
    parts = KEY.fullmatch(plain_key)
    return parts is None or session.get(ApiKey, parts[2]) is not None


def _checksum(text: str) -> str:
    """CRC-32 in base 62."""
    value, digits = zlib.crc32(text.encode()), ""
    for _ in range(6):
        value, digit = divmod(value, 62)
        digits = ALPHABET[digit] + digits
    return digits


def _digest(plain_key: str) -> str:
    return hashlib.sha256(plain_key.encode()).hexdigest()


def _write_private(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{new_token()}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
        rename_durably(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
