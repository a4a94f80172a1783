"""Webhook endpoints of a project. What is sent to them, and when, stands in core.jobs.announcements and worker.webhook_delivery."""

from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from api.idempotency import AlreadyCreated, Creation, forget_object, record_creation, refuse_repetition
from api.pagination import unknown_cursor
from api.state import ApiState
from api.webhooks.dependencies import no_such_endpoint
from api.webhooks.schemas import CreateEndpoint, UpdateEndpoint, endpoint_with_secret
from core.audit import Actor, record
from core.database import database_now, unix_now
from core.errors import BadRequest, Unavailable, WebhookNotDelivered
from core.ids import new_webhook_id
from core.tables.projects import Project
from core.tables.webhooks import WebhookDelivery, WebhookEndpoint
from core.webhooks.addresses import UrlRefused, parse_target
from core.webhooks.deliveries import disable_endpoint, signing_secrets
from core.webhooks.events import new_event_body
from core.webhooks.sending import NotDelivered, send
from core.webhooks.signing import new_secret

MAX_ENDPOINTS = 20
"""Of one project."""
OLD_SECRET_SECONDS = 24 * 3600.0
SAMPLE_JOB = "ftjob-sample"
"""What a test event tells of. No job is called so."""


def create_endpoint(state: ApiState, project_id: str, actor: Actor, creation: Creation, wanted: CreateEndpoint) -> WebhookEndpoint:
    """A new endpoint, or the one that an earlier try of the request has created. Raises BadRequest on a URL that webhooks may not go
    to, and where the project has MAX_ENDPOINTS."""
    _check_url(state, wanted.url)
    try:
        return _create_endpoint(state, project_id, actor, creation, wanted)
    except AlreadyCreated as earlier:
        with state.database.reading() as session:
            return session.get_one(WebhookEndpoint, earlier.object_id)


def _create_endpoint(state: ApiState, project_id: str, actor: Actor, creation: Creation, wanted: CreateEndpoint) -> WebhookEndpoint:
    now = unix_now()
    endpoint = WebhookEndpoint(
        id=new_webhook_id("whe"),
        project_id=project_id,
        name=wanted.name,
        url=wanted.url,
        event_types=list(dict.fromkeys(wanted.event_types)),
        secret=new_secret(),
        created_at=now,
        updated_at=now,
    )
    with state.database.transaction() as session:
        refuse_repetition(session, creation)
        session.execute(select(Project.id).where(Project.id == project_id).with_for_update(key_share=True))  # so that two can't both be the last one
        existing = session.scalar(select(func.count()).select_from(WebhookEndpoint).where(WebhookEndpoint.project_id == project_id)) or 0
        if existing >= MAX_ENDPOINTS:
            raise BadRequest(f"this project has {MAX_ENDPOINTS} webhook endpoints already; delete one first", code="too_many_webhook_endpoints")
        session.add(endpoint)
        record(session, actor, "webhook_endpoint.created", project_id=project_id, object_id=endpoint.id, data=_audited(state, wanted.model_dump()))
        record_creation(session, creation, endpoint.id, endpoint_with_secret(endpoint))
    return endpoint


def list_endpoints(state: ApiState, project_id: str, *, after: str | None, limit: int) -> list[WebhookEndpoint]:
    """Up to `limit` + 1 endpoints, newest first."""
    own = WebhookEndpoint.project_id == project_id
    statement = select(WebhookEndpoint).where(own).order_by(WebhookEndpoint.id.desc()).limit(limit + 1)
    with state.database.reading() as session:
        if after is not None:
            if session.scalar(select(WebhookEndpoint.id).where(own, WebhookEndpoint.id == after)) is None:
                raise unknown_cursor(after)
            statement = statement.where(WebhookEndpoint.id < after)
        return list(session.scalars(statement))


def update_endpoint(state: ApiState, endpoint: WebhookEndpoint, actor: Actor, wanted: UpdateEndpoint) -> WebhookEndpoint:
    """Raises BadRequest on a URL that webhooks may not go to."""
    if wanted.url is not None:
        _check_url(state, wanted.url)
    changes = {name: value for name, value in wanted.model_dump(exclude={"enabled"}).items() if value is not None}
    if "event_types" in changes:
        changes["event_types"] = list(dict.fromkeys(changes["event_types"]))
    with state.database.transaction() as session:
        current = _locked(session, endpoint)
        changed = {name: value for name, value in changes.items() if getattr(current, name) != value}
        if wanted.enabled and current.disabled_at is not None:
            changed |= {"disabled_at": None, "disabled_reason": None}
        if changed:
            for name, value in {**changed, "updated_at": unix_now()}.items():
                setattr(current, name, value)
        if wanted.enabled is False:
            session.flush()
            disable_endpoint(session, current.id, "disabled through the API")
            session.refresh(current)
        if asked := _audited(state, wanted.model_dump(exclude_none=True)):
            record(session, actor, "webhook_endpoint.updated", project_id=endpoint.project_id, object_id=endpoint.id, changes_requested=asked)
    return current


def rotate_secret(state: ApiState, endpoint: WebhookEndpoint, actor: Actor, *, keep_old: bool) -> WebhookEndpoint:
    """A new secret. With `keep_old` the one before it signs too for OLD_SECRET_SECONDS."""
    with state.database.transaction() as session:
        current = _locked(session, endpoint)
        until = session.execute(select(database_now() + OLD_SECRET_SECONDS)).scalar_one()
        current.previous_secret, current.previous_secret_until = (current.secret, until) if keep_old else (None, None)
        current.secret = new_secret()
        current.updated_at = unix_now()
        record(session, actor, "webhook_endpoint.secret_rotated", project_id=endpoint.project_id, object_id=endpoint.id)
    return current


def delete_endpoint(state: ApiState, endpoint: WebhookEndpoint, actor: Actor) -> None:
    """What waits for it is not delivered any more."""
    with state.database.transaction() as session:
        _locked(session, endpoint)
        session.execute(delete(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint.id))
        session.execute(delete(WebhookEndpoint).where(WebhookEndpoint.id == endpoint.id))
        forget_object(session, endpoint.id)
        record(session, actor, "webhook_endpoint.deleted", project_id=endpoint.project_id, object_id=endpoint.id)


def send_test(state: ApiState, endpoint: WebhookEndpoint, event_type: str) -> int:
    """A sample event, sent once. Returns the HTTP status of the endpoint's answer. Raises WebhookNotDelivered where there is none."""
    with state.database.reading() as session:
        secrets = signing_secrets(session, endpoint)
    body = new_event_body(event_type, SAMPLE_JOB)
    try:
        return send(endpoint.url, new_webhook_id("wh"), body, secrets, allow_insecure=state.settings.webhook_allow_insecure)
    except NotDelivered as error:
        raise WebhookNotDelivered(f"the test event was not delivered: {error}", param="webhook_endpoint_id") from error


def check_test_slots(state: ApiState) -> None:
    """Raises Unavailable while as many tests are under way as may be: each holds a thread until the endpoint answers."""
    if state.webhook_tests.available_tokens < 1:
        raise Unavailable("other webhook tests are under way; try again in a moment")


def _audited(state: ApiState, asked: dict[str, Any]) -> dict[str, Any]:
    """What was asked for, of the URL its machine alone: people put secrets into paths and queries."""
    if "url" not in asked:
        return asked
    target = parse_target(asked["url"], allow_insecure=state.settings.webhook_allow_insecure)
    return {**asked, "url": f"{target.scheme}://{target.host}:{target.port}"}


def _check_url(state: ApiState, url: str) -> None:
    try:
        parse_target(url, allow_insecure=state.settings.webhook_allow_insecure)
    except UrlRefused as error:
        raise BadRequest(f"url: {error}", code="invalid_webhook_url", param="url") from error


def _locked(session: Session, endpoint: WebhookEndpoint) -> WebhookEndpoint:
    """Its row as it is now. Raises NotFound where it was deleted meanwhile."""
    current = session.scalar(select(WebhookEndpoint).where(WebhookEndpoint.id == endpoint.id).with_for_update())
    if current is None:
        raise no_such_endpoint(endpoint.id)
    return current
