"""Other forms of a model's weights: asked for by the API, made by a worker, one at a time for each model and form.

pending ──claim──► running ──finish──► ready
   ▲                 │ fail
   │   release       ├─────────────► failed      (the model can't have this form, or three attempts went wrong)
   └─────────────────┘                  │ request, a minute later or more, unless it can never be made
   ▲────────────────────────────────────┘

A claim is a lease with a token, as a job's is (core.jobs.leases): whoever makes the export passes the token to every later
change, and one whose lease ran out while another took over raises ExportLost.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, func, or_, select, update
from sqlalchemy.orm import Session

from core.database import database_now, insert_for, unix_now
from core.errors import ExportInProgress, ModelNotFound
from core.ids import new_token
from core.storage import StoredObject
from core.tables.exports import ModelExport
from core.tables.models import Model

MAX_ATTEMPTS = 3
UNDER_WAY = ("pending", "running")
MAX_UNDER_WAY = 4
"""Of one project: others' wait in the same line."""
RETRY_FAILED_SECONDS = 60.0
IMPOSSIBLE = "export_not_possible"
"""The code of a failure that no other attempt would change."""

CLAIMABLE = or_(ModelExport.status == "pending", and_(ModelExport.status == "running", ModelExport.lease_until < database_now()))


class ExportLost(Exception):
    """The export is no longer held under this token, or its model was deleted: stop, and write nothing more."""


@dataclass(frozen=True)
class ExportClaim:
    model_id: str
    format: str
    lease_token: str
    attempt: int


def request_export(session: Session, model: Model, form: str) -> ModelExport:
    """The row of the model's export, which is queued where there is none or where it failed some time ago. Raises ModelNotFound where
    the model was deleted meanwhile, and ExportInProgress where its project has as many under way as it may."""
    if session.scalar(select(Model.id).where(Model.id == model.id, Model.status != "deleted").with_for_update()) is None:
        raise ModelNotFound(f"The model {model.id!r} does not exist", param="model")
    now = unix_now()
    under_way = select(func.count()).select_from(ModelExport).join(Model).where(Model.project_id == model.project_id, ModelExport.status.in_(UNDER_WAY))
    there = session.get(ModelExport, (model.id, form))
    if (there is None or there.status == "failed") and (session.scalar(under_way) or 0) >= MAX_UNDER_WAY:
        if there is not None:
            return there
        raise ExportInProgress(f"this project has {MAX_UNDER_WAY} exports being made already; ask again when one is ready")
    values = {"model_id": model.id, "format": form, "status": "pending", "attempts": 0, "created_at": now, "updated_at": now}
    session.execute(insert_for(session, ModelExport).values(values).on_conflict_do_nothing(index_elements=["model_id", "format"]))
    export = session.get_one(ModelExport, (model.id, form), with_for_update=True)
    too_early = export.updated_at > now - RETRY_FAILED_SECONDS
    if export.status == "failed" and not too_early and (export.error or {}).get("code") != IMPOSSIBLE:
        export.status, export.attempts, export.error, export.updated_at = "pending", 0, None, now
    return export


def export_is_waiting(session: Session) -> bool:
    """Whether `claim_export` would find any; only reads, so that looking often costs no write lock."""
    return session.scalar(select(ModelExport.model_id).where(CLAIMABLE).limit(1)) is not None


def held_exports(session: Session) -> set[str]:
    """The tokens of all that are being made."""
    tokens = session.scalars(select(ModelExport.lease_token).where(ModelExport.status == "running"))
    return {token for token in tokens if token is not None}


def claim_export(session: Session, lease_seconds: float) -> ExportClaim | None:
    """Hold the oldest export that nobody makes. One that was begun three times without an end fails instead."""
    session.execute(
        update(ModelExport)
        .where(CLAIMABLE, ModelExport.attempts >= MAX_ATTEMPTS)
        .values(
            status="failed",
            lease_token=None,
            lease_until=None,
            updated_at=unix_now(),
            error=_error("export_failed", "making it ended three times without a result"),
        )
        .execution_options(synchronize_session=False)
    )
    oldest = select(ModelExport.model_id, ModelExport.format).where(CLAIMABLE).order_by(ModelExport.created_at).limit(1).with_for_update(skip_locked=True)
    found = session.execute(oldest).one_or_none()
    if found is None:
        return None
    token = new_token()
    claimed = session.execute(
        update(ModelExport)
        .where(ModelExport.model_id == found.model_id, ModelExport.format == found.format, CLAIMABLE)
        .values(status="running", attempts=ModelExport.attempts + 1, lease_token=token, lease_until=database_now() + lease_seconds, updated_at=unix_now())
        .returning(ModelExport.attempts)
        .execution_options(synchronize_session=False)
    ).one_or_none()
    return None if claimed is None else ExportClaim(found.model_id, found.format, token, claimed.attempts)


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


_RELEASED: dict[str, Any] = {"lease_token": None, "lease_until": None}


def _error(code: str, message: str) -> dict[str, Any]:
    return {"code": code, "message": message}


def _change_held(session: Session, claim: ExportClaim, **columns: Any) -> None:
    held = session.execute(
        update(ModelExport)
        .where(ModelExport.model_id == claim.model_id, ModelExport.format == claim.format, ModelExport.lease_token == claim.lease_token)
        .values(updated_at=unix_now(), **columns)
        .returning(ModelExport.model_id)
        .execution_options(synchronize_session=False)
    ).one_or_none()
    if held is None:
        raise ExportLost(f"the {claim.format} export of {claim.model_id} is no longer held by this attempt")
