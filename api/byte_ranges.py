"""Stored objects as responses, whole or in part (`Range: bytes=…`), so that a broken download can go on."""

import re
from urllib.parse import quote

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from api.state import ApiState
from core.errors import NotFound, RangeNotSatisfiable
from core.logging import get_logger
from core.storage import StoredObject, verified

ONE_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")

log = get_logger(__name__)


def requested_range(header: str | None, size_bytes: int) -> tuple[int, int] | None:
    """First byte and the one after the last, or None for the whole object.

    As the standard wants it, a header that is malformed or asks for several ranges is ignored. Raises
    RangeNotSatisfiable where the range lies outside the object.
    """
    found = ONE_RANGE.fullmatch((header or "").replace(" ", ""))
    if found is None or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if first:
        start, end = int(first), size_bytes if not last else min(size_bytes, int(last) + 1)
        if last and int(last) < int(first):
            return None
    else:
        start, end = max(0, size_bytes - int(last)), size_bytes
    if start >= end:
        raise RangeNotSatisfiable(f"the range lies outside the object's {size_bytes:,} bytes", headers={"content-range": f"bytes */{size_bytes}"})
    return start, end


async def stored_object_response(request: Request, state: ApiState, stored: StoredObject, *, filename: str, media_type: str) -> Response:
    """The object as a download named `filename`. Raises NotFound where its bytes are gone.

    A whole object whose hash is wrong ends too early, as a broken download does. Who asks for a part compares x-sha256 at the end.
    HEAD is answered from the record alone.
    """
    etag = f'"{stored.sha256}"'
    headers = {
        "accept-ranges": "bytes",
        "etag": etag,
        "x-sha256": stored.sha256,
        "x-content-type-options": "nosniff",
        "content-disposition": f"attachment; filename*=UTF-8''{quote(filename, safe='')}",
    }
    may_be_partial = request.headers.get("if-range", etag) == etag
    wanted = requested_range(request.headers.get("range"), stored.size_bytes) if may_be_partial else None
    start, end = wanted or (0, stored.size_bytes)
    headers["content-length"] = str(end - start)
    if wanted:
        headers["content-range"] = f"bytes {start}-{end - 1}/{stored.size_bytes}"
    if request.method == "HEAD":
        return Response(None, 206 if wanted else 200, headers, media_type)
    try:
        chunks = await state.storage_threads.run(state.storage.read, stored.key, start, end)
    except FileNotFoundError as error:
        log.error("object_missing", key=stored.key)
        raise NotFound("the object's bytes are no longer in storage") from error
    if not wanted:
        chunks = verified(chunks, stored.key, stored.sha256)
    return StreamingResponse(state.storage_threads.chunks(chunks), 206 if wanted else 200, headers, media_type)
