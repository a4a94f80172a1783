"""Other formats of a model's weights: asked for by the API, made by a worker, one at a time for each model and format.

pending ──claim──► running ──finish──► ready
   ▲                 │ fail
   │   release       ├─────────────► failed      (the model can't have this format, or three attempts went wrong)
   └─────────────────┘                  │ request, a minute later or more, unless it can never be made
   ▲────────────────────────────────────┘

A ready one is forgotten some days after it was made.

A claim is a lease with a token, as a job's is (core.jobs.leases): whoever makes the export passes the token to every later
change, and one whose lease ran out while another took over raises ExportLost.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, case, delete, func, or_, select, update
from sqlalchemy.orm import Session

from core.database import database_now, unix_now
from core.errors import ExportInProgress, ModelNotFound
from core.ids import new_token
from core.jobs.leases import LeaseLost
from core.storable import without_nul
from core.storage import StoredObject
from core.tables.exports import ModelExport
from core.tables.models import Model

MAX_ATTEMPTS = 3
UNFINISHED = ("pending", "running")
MAX_UNFINISHED_OF_A_PROJECT = 4
"""Others' wait in the same line."""
RETRY_AFTER_SECONDS = 10.0
"""Times the attempts so far: how long a worker leaves an export that went wrong. What was wrong may pass; and others go first."""
RETRY_FAILED_SECONDS = 60.0
IMPOSSIBLE = "export_not_possible"
"""The code of a failure that no other attempt would change."""

RESTED = or_(ModelExport.attempts == 0, ModelExport.updated_at + RETRY_AFTER_SECONDS * ModelExport.attempts < database_now())
CLAIMABLE = or_(
    and_(ModelExport.status == "pending", RESTED),
    and_(ModelExport.status == "running", ModelExport.lease_until < database_now()),
)
PLACE_IN_LINE = case((ModelExport.attempts == 0, ModelExport.created_at), else_=ModelExport.updated_at)
"""Since when it waits: whatever went wrong waits anew, behind those who were asked for meanwhile. One that a worker handed back
uncounted keeps its place."""


class ExportLost(LeaseLost):
    """The export is no longer held under this token, or its model was deleted: stop, and write nothing more."""


@dataclass(frozen=True)
class ExportClaim:
    model_id: str
    format: str
    lease_token: str
    attempt: int


def request_export(session: Session, model: Model, format: str) -> ModelExport:
    """The row of the model's export, which is queued where there is none or where it failed some time ago. Raises ModelNotFound where
    the model was deleted meanwhile, and ExportInProgress where its project has as many under way as it may."""
    _lock_model(session, model)
    export = session.get(ModelExport, (model.id, format), with_for_update=True)
    if export is None:
        if not _has_room(session, model.project_id):
            raise ExportInProgress(f"this project has {MAX_UNFINISHED_OF_A_PROJECT} exports being made already; ask again when one is ready")
        export = ModelExport(model_id=model.id, format=format)
        session.add(export)
        _queue(export)
    elif _may_be_queued_again(export) and _has_room(session, model.project_id):
        _queue(export)
    return export


def _lock_model(session: Session, model: Model) -> None:
    """Requests for one model wait for each other, and for its deletion. Raises ModelNotFound."""
    if session.scalar(select(Model.id).where(Model.id == model.id, Model.status != "deleted").with_for_update()) is None:
        raise ModelNotFound(f"The model {model.id!r} does not exist", param="model")


def _has_room(session: Session, project_id: str) -> bool:
    unfinished = select(func.count()).select_from(ModelExport).join(Model).where(Model.project_id == project_id, ModelExport.status.in_(UNFINISHED))
    return (session.scalar(unfinished) or 0) < MAX_UNFINISHED_OF_A_PROJECT


def _may_be_queued_again(export: ModelExport) -> bool:
    too_early = export.updated_at > unix_now() - RETRY_FAILED_SECONDS
    return export.status == "failed" and not too_early and (export.error or {}).get("code") != IMPOSSIBLE


def _queue(export: ModelExport) -> None:
    """As one that was never asked for: whoever asks again for what failed stands at the end of the line."""
    now = unix_now()
    export.status, export.attempts, export.error, export.created_at, export.updated_at = "pending", 0, None, now, now


def export_is_waiting(session: Session) -> bool:
    """Whether `claim_export` would find any; only reads, so that looking often costs no write lock."""
    return session.scalar(select(ModelExport.model_id).where(CLAIMABLE).limit(1)) is not None


def tokens_of_running_exports(session: Session) -> set[str]:
    tokens = session.scalars(select(ModelExport.lease_token).where(ModelExport.status == "running"))
    return {token for token in tokens if token is not None}


def claim_export(session: Session, lease_seconds: float) -> ExportClaim | None:
    """Hold the export that waits longest. One that was begun three times without an end fails instead."""
    _fail_those_never_ended(session)
    first = select(ModelExport.model_id, ModelExport.format).where(CLAIMABLE).order_by(PLACE_IN_LINE).limit(1).with_for_update(skip_locked=True)
    found = session.execute(first).one_or_none()
    if found is None:
        return None
    token = new_token()
    claimed = session.execute(
        update(ModelExport)
        .where(ModelExport.model_id == found.model_id, ModelExport.format == found.format, CLAIMABLE)
        .values(
            status="running",
            attempts=ModelExport.attempts + 1,
            lease_token=token,
            lease_until=database_now() + lease_seconds,
            updated_at=database_now(),
        )
        .returning(ModelExport.attempts)
        .execution_options(synchronize_session=False)
    ).one_or_none()
    return None if claimed is None else ExportClaim(found.model_id, found.format, token, claimed.attempts)


def _fail_those_never_ended(session: Session) -> None:
    session.execute(
        update(ModelExport)
        .where(CLAIMABLE, ModelExport.attempts >= MAX_ATTEMPTS)
        .values(status="failed", updated_at=database_now(), error=_error("export_failed", "making it ended three times without a result"), **_RELEASED)
        .execution_options(synchronize_session=False)
    )


def assert_export_held(session: Session, claim: ExportClaim) -> None:
    """Only reads. Raises ExportLost."""
    token = session.scalar(select(ModelExport.lease_token).where(ModelExport.model_id == claim.model_id, ModelExport.format == claim.format))
    if token != claim.lease_token:
        raise _lost(claim)


def renew_export(session: Session, claim: ExportClaim, lease_seconds: float) -> None:
    """Raises ExportLost."""
    _change_held(session, claim, lease_until=database_now() + lease_seconds)


def finish_export(session: Session, claim: ExportClaim, stored: StoredObject) -> None:
    """Raises ExportLost."""
    _change_held(session, claim, status="ready", storage_key=stored.key, archive_bytes=stored.size_bytes, archive_sha256=stored.sha256, **_RELEASED)


def release_export(session: Session, claim: ExportClaim) -> None:
    """Let another worker make it, because this one ends: not counted as an attempt. Raises ExportLost."""
    _change_held(session, claim, status="pending", attempts=ModelExport.attempts - 1, **_RELEASED)


def fail_export(session: Session, claim: ExportClaim, code: str, message: str) -> None:
    """For good, or to be tried again by a worker while there are attempts left. Raises ExportLost."""
    if code == IMPOSSIBLE or claim.attempt >= MAX_ATTEMPTS:
        _change_held(session, claim, status="failed", error=_error(code, message), **_RELEASED)
    else:
        _change_held(session, claim, status="pending", error=_error(code, message), **_RELEASED)


def forget_old_exports(session: Session, older_than_seconds: float) -> list[str]:
    """ready → gone, to be made anew when somebody asks. Returns the keys of their objects."""
    old = delete(ModelExport).where(ModelExport.status == "ready", ModelExport.updated_at < database_now() - older_than_seconds)
    return [key for key in session.scalars(old.returning(ModelExport.storage_key)) if key is not None]


_RELEASED: dict[str, Any] = {"lease_token": None, "lease_until": None}


def _error(code: str, message: str) -> dict[str, Any]:
    return {"code": code, "message": without_nul(message)}


def _lost(claim: ExportClaim) -> ExportLost:
    return ExportLost(f"the {claim.format} export of {claim.model_id} is no longer held by this attempt")


def _change_held(session: Session, claim: ExportClaim, **columns: Any) -> None:
    """The database's clock, because `RESTED` compares with it."""
    row = session.execute(
        update(ModelExport)
        .where(ModelExport.model_id == claim.model_id, ModelExport.format == claim.format, ModelExport.lease_token == claim.lease_token)
        .values(updated_at=database_now(), **columns)
        .returning(ModelExport.model_id)
        .execution_options(synchronize_session=False)
    ).one_or_none()
    if row is None:
        raise _lost(claim)
