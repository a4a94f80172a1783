"""What an event stream sends, as server-sent events."""

import orjson
from fastapi.sse import format_sse_event

from api.fine_tuning.jobs.schemas import event_object
from core.errors import ServiceError
from core.tables.jobs import JobEvent

DONE = b"data: [DONE]\n\n"
LINE_ENDS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}
"""Characters that JSON leaves as they are and that clients which split text into lines take for an end of one."""


def event_frame(event: JobEvent) -> bytes:
    """The event's JSON as in the list of events, under its id."""
    text = event_object(event).model_dump_json()
    for character, escaped in LINE_ENDS.items():
        text = text.replace(character, escaped)
    return format_sse_event(data_str=text, id=event.id)


def error_frame(error: ServiceError) -> bytes:
    """Without an id, so that a reader's last one stays that of an event."""
    return format_sse_event(data_str=orjson.dumps(error.body()).decode())
