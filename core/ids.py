"""Identifiers: a prefix and a UUIDv7, so that ids sort by creation within a table."""

import re
from typing import Literal

import uuid_utils

Prefix = Literal["proj", "file", "ftjob", "ftevent", "ftckpt", "req", "audit_log"]
WebhookPrefix = Literal["whe", "wh", "evt"]


def new_id(prefix: Prefix) -> str:
    return f"{prefix}-{uuid_utils.uuid7().hex}"


def new_webhook_id(prefix: WebhookPrefix) -> str:
    """Likewise, with an underscore as OpenAI writes them: of an endpoint, a delivery, an event."""
    return f"{prefix}_{uuid_utils.uuid7().hex}"


def new_token() -> str:
    """An unguessable name: lease tokens, serving names of adapters, storage keys."""
    return str(uuid_utils.uuid4().hex)


def tuned_model_id(base_model: str, project: str, suffix: str | None, job_id: str) -> str:
    """`ft:<base>:<project>:<suffix>:<id>`; `id` is the random end of the job's id, so it is unique and stable."""
    cleaned = re.sub(r"[^A-Za-z0-9_-]+", "-", suffix or "").strip("-")
    return f"ft:{base_model}:{project}:{cleaned}:{job_id.removeprefix('ftjob-')[-12:]}"


def checkpoint_model_id(model_id: str, step: int) -> str:
    return f"{model_id}:ckpt-step-{step}"


def model_file_name(model_id: str) -> str:
    """A model's id as the stem of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", model_id)
