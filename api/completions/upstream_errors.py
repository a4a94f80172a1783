"""The inference server's refusals in this server's words. Its internal names never reach a client."""

from typing import Any

from api.completions.served_models import ServedModel
from core.errors import BadRequest, InferenceFailed, InferenceUnavailable, RequestTooLarge, ServiceError
from core.inference_client import KEY_REFUSED, KEY_REFUSED_STATUSES
from core.logging import get_logger
from sdft_engine.contract.quoting import shortened

log = get_logger(__name__)


def translated(status: int, body: Any, model: ServedModel) -> ServiceError:
    """4xx keep their message and param, for they are about what the client wrote; the rest is the server's own trouble. vLLM's code
    of a 400 is the number 400, which says nothing."""
    message, param, code = _details(body)
    message = message.replace(model.serving_name, model.public_id)
    if status in KEY_REFUSED_STATUSES:
        log.error("inference_key_refused", status=status, message=message)
        return InferenceFailed(KEY_REFUSED)
    if status >= 500:
        log.warning("inference_failed", status=status, message=message, model=model.public_id)
    if status == 413:
        return RequestTooLarge(message)
    if status in (408, 429, 503):
        return InferenceUnavailable(message)
    if status in (400, 422):
        return BadRequest(message, param=param, code=code or "invalid_value")
    if status == 404:
        return InferenceFailed(f"the inference server does not serve the model {model.public_id}")
    return InferenceFailed(f"the inference server failed ({status}): {message}")


def error_event(event: Any, model: ServedModel) -> dict[str, Any]:
    """The error of a stream that has already begun."""
    message, param, code = _details(event)
    return InferenceFailed(message.replace(model.serving_name, model.public_id), param=param, code=code).body()


def _details(body: Any) -> tuple[str, str | None, str | None]:
    """Message, param and code, from OpenAI's shape or vLLM's older flat one."""
    error = body.get("error", body) if isinstance(body, dict) else {"message": body}
    if not isinstance(error, dict):
        error = {"message": error}
    param, code = error.get("param"), error.get("code")
    return (
        str(error.get("message") or "no reason given")[:2000],
        shortened(param) if isinstance(param, str) else None,
        code if isinstance(code, str) else None,
    )
