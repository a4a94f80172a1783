"""The events that webhooks tell of, as OpenAI's."""

import orjson

from core.database import unix_now
from core.ids import new_webhook_id

SUCCEEDED = "fine_tuning.job.succeeded"
FAILED = "fine_tuning.job.failed"
CANCELLED = "fine_tuning.job.cancelled"
EVENT_TYPES = (SUCCEEDED, FAILED, CANCELLED)


def new_event_body(event_type: str, object_id: str) -> str:
    """A new event about an object, as the JSON that is signed and sent."""
    event = {"id": new_webhook_id("evt"), "object": "event", "created_at": int(unix_now()), "type": event_type, "data": {"id": object_id}}
    return orjson.dumps(event).decode()
