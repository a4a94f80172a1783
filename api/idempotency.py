"""The same request, sent again, creates nothing more.

A client that got no answer sends its request again, and the first try may have succeeded. Two things say that it is the same:

- The client names the request with `Idempotency-Key`: for a day, that key brings the first answer back, byte by byte. With another
  method, path or body it is an error.
- The stock client names nothing, but counts its tries in `x-stainless-retry-count`. A later try stands for what the same API key
  created last with the same method, path and body, up to two minutes before it was sent; it is answered with that object as it is
  now.

A record of either kind is written in the transaction that creates the object, so that neither is ever there without the other. Where
two tries run at once, the record's primary key decides: the second waits for the first to commit, and then finds it.

A first try can also come second: held up on its way, it finds that a later try has created the object meanwhile. It can only be its
own later try where that arrived after it did, and then stands for the same object.

Times are compared on the database's clock: another try may have come to another machine.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from pydantic import BaseModel
from sqlalchemy import ColumnElement, delete, not_, or_, select
from sqlalchemy.orm import Session

from api.caller import caller_of
from api.state import ApiState
from core.database import database_now, insert_for
from core.errors import BadRequest, Conflict
from core.tables.idempotency import IdempotencyRecord

RETRY_SECONDS = 120
RETRY_KEPT_SECONDS = 3600
"""A later try's body may take that long to arrive before it is compared."""
NAMED_SECONDS = 86_400
LONGEST_NAME = 255


class AlreadyCreated(Exception):
    """An earlier try has created this object. Raised inside the transaction, which it undoes; services answer with the object."""

    def __init__(self, object_id: str) -> None:
        super().__init__(object_id)
        self.object_id = object_id


class AlreadyAnswered(Exception):
    """A request of this name was answered so. The application's error handlers answer it likewise."""

    def __init__(self, answer: str) -> None:
        super().__init__("answered before")
        self.answer = answer


@dataclass(frozen=True)
class Creation:
    """One try of a request that creates something, its body known by hash. `arrived_at` on this process's monotonic clock."""

    fingerprint: str
    request_sha256: str
    is_named: bool
    is_retry: bool
    arrived_at: float


@dataclass(frozen=True)
class Attempt:
    """The same before its body has been read."""

    key_id: str
    method: str
    path: str
    name: str | None
    """Of `Idempotency-Key`."""
    is_retry: bool
    arrived_at: float

    def of_body(self, body_sha256: str) -> Creation:
        request_sha256 = sha256_of(self.method, self.path, body_sha256)
        fingerprint = sha256_of("request", self.key_id, request_sha256) if self.name is None else sha256_of("name", self.key_id, self.name)
        return Creation(fingerprint, request_sha256, self.name is not None, self.is_retry, self.arrived_at)


def sha256_of(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def refuse_repetition(session: Session, creation: Creation) -> None:
    """Raises AlreadyCreated, AlreadyAnswered or Conflict where an earlier try is known. Asked first, because what an earlier try
    needed may be gone since; `record_creation` decides."""
    if creation.is_named or creation.is_retry:
        room = _makes_room_for(creation, _database_time(session))
        known = select(IdempotencyRecord).where(IdempotencyRecord.fingerprint == creation.fingerprint, not_(room))
        record = session.scalar(known)
        if record is not None:
            _repeat(record, creation)


def record_creation(session: Session, creation: Creation, object_id: str, answer: BaseModel) -> None:
    """In the transaction that creates the object, at its end: others that create the same wait from here on. Raises as
    `refuse_repetition` does where another try was faster, and this one must leave nothing behind."""
    now = _database_time(session)
    columns = {
        "request_sha256": creation.request_sha256,
        "object_id": object_id,
        "by_retry": creation.is_retry,
        "answer": answer.model_dump_json() if creation.is_named else None,
        "created_at": now,
        "expires_at": now + (NAMED_SECONDS if creation.is_named else RETRY_KEPT_SECONDS),
    }
    statement = insert_for(session, IdempotencyRecord).values(fingerprint=creation.fingerprint, **columns)
    statement = statement.on_conflict_do_update(index_elements=["fingerprint"], set_=columns, where=_makes_room_for(creation, now))
    if session.scalar(statement.returning(IdempotencyRecord.fingerprint)) is None:
        _repeat(session.get_one(IdempotencyRecord, creation.fingerprint), creation)


def forget_object(session: Session, object_id: str) -> None:
    """A deleted object is nothing that a later try could be answered with. The answers to named requests stay."""
    session.execute(delete(IdempotencyRecord).where(IdempotencyRecord.object_id == object_id, IdempotencyRecord.answer.is_(None)))


def delete_expired_records(state: ApiState) -> int:
    """Returns how many."""
    with state.database.transaction() as session:
        expired = delete(IdempotencyRecord).where(IdempotencyRecord.expires_at <= database_now()).returning(IdempotencyRecord.fingerprint)
        return len(session.scalars(expired).all())


def _database_time(session: Session) -> float:
    """Asked by itself: within a statement that waits for another try, the clock would go on."""
    return session.execute(select(database_now())).scalar_one()


def _makes_room_for(creation: Creation, now: float) -> ColumnElement[bool]:
    """Whether a record of the same fingerprint stands for something else, and may be replaced. `now` by the database's clock."""
    if creation.is_named:
        return IdempotencyRecord.expires_at <= now
    arrived_at = now - (time.monotonic() - creation.arrived_at)
    if creation.is_retry:
        return IdempotencyRecord.created_at < arrived_at - RETRY_SECONDS
    return or_(IdempotencyRecord.by_retry.is_(False), IdempotencyRecord.created_at < arrived_at)


def _repeat(record: IdempotencyRecord, creation: Creation) -> None:
    if record.request_sha256 != creation.request_sha256:
        message = "Idempotency-Key: this key was used before, with another request; use a new one for each request"
        raise Conflict(message, code="idempotency_key_reused")
    if record.answer is not None:
        raise AlreadyAnswered(record.answer)
    raise AlreadyCreated(record.object_id)


async def is_later_try(request: Request) -> bool:
    """Whether the stock client has sent this request before, and got no answer that it could use."""
    tries = request.headers.get("x-stainless-retry-count", "0")
    return tries.isdecimal() and tries.strip("0") != ""


async def _attempt(request: Request) -> Attempt:
    caller = caller_of(request.scope)
    assert caller is not None, "a route without a key creates nothing"
    name = request.headers.get("idempotency-key")
    if name is not None and not (0 < len(name) <= LONGEST_NAME and name.isprintable()):
        raise BadRequest(f"Idempotency-Key: must have 1 to {LONGEST_NAME} printable characters", code="invalid_value", param="Idempotency-Key")
    return Attempt(caller.key_id, request.method, request.scope["path"], name, await is_later_try(request), request.state.arrived_at)


IsLaterTry = Annotated[bool, Depends(is_later_try)]
CreationAttempt = Annotated[Attempt, Depends(_attempt)]


async def _json_creation(request: Request, attempt: CreationAttempt) -> Creation:
    return attempt.of_body(hashlib.sha256(await request.body()).hexdigest())


JsonCreation = Annotated[Creation, Depends(_json_creation)]
"""Of a route whose body is JSON: the hash is that of its bytes."""
