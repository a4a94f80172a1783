"""Errors that a client sees. Each class carries its status and code; one handler renders them.

ServiceError (500 server_error)
├── BadRequest (400 invalid_request_error)
│   ├── InvalidFile (400 invalid_training_file)
│   ├── ExportNotPossible (400 export_not_possible)
│   └── WebhookNotDelivered (400 webhook_not_delivered)
├── AuthenticationFailed (401)
├── InsufficientScope (403 insufficient_scope)
├── NotFound (404 not_found)
│   └── ModelNotFound (404 model_not_found)
├── MethodNotAllowed (405)
├── RequestTimeout (408)
├── Conflict (409)                    never retried: `x-should-retry: false`
├── RequestTooLarge (413)
├── RangeNotSatisfiable (416)
├── RateLimited (429 rate_limit_exceeded)      retried by clients after `retry-after`
├── Unavailable (503)                 retried by clients after `retry-after`
│   ├── InferenceUnavailable (503 inference_unavailable)
│   ├── StorageUnavailable (503 storage_unavailable)
│   └── ExportInProgress (503 export_in_progress)
├── InferenceFailed (502 inference_failed)
├── InferenceTimeout (504 inference_timeout)   never retried: every attempt would be generated anew
├── ExportFailed (500 export_failed)  not retried at once: making it was tried three times
└── StorageFull (507 storage_full)
"""

from typing import Any, ClassVar


class ServiceError(Exception):
    """What a client is told: `message` for people, `code` for programs, `param` for the field that is wrong. `headers` go on the
    response, `extra` into the error object."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = "server_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param
        self.headers = headers or {}
        self.extra = extra or {}

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code, **self.extra}}


class BadRequest(ServiceError):
    status = 400
    type = "invalid_request_error"
    default_code: ClassVar[str | None] = None


class InvalidFile(BadRequest):
    default_code = "invalid_training_file"


class ExportNotPossible(BadRequest):
    default_code = "export_not_possible"


class WebhookNotDelivered(BadRequest):
    default_code = "webhook_not_delivered"


class AuthenticationFailed(ServiceError):
    status = 401
    type = "invalid_request_error"
    default_code = "invalid_api_key"


class InsufficientScope(ServiceError):
    status = 403
    type = "invalid_request_error"
    default_code = "insufficient_scope"


class NotFound(ServiceError):
    status = 404
    type = "invalid_request_error"
    default_code = "not_found"


class ModelNotFound(NotFound):
    default_code = "model_not_found"


class MethodNotAllowed(ServiceError):
    status = 405
    type = "invalid_request_error"
    default_code = "method_not_allowed"


class RequestTimeout(ServiceError):
    status = 408
    type = "invalid_request_error"
    default_code = "request_timeout"


class Conflict(ServiceError):
    status = 409
    type = "invalid_request_error"
    default_code = "conflict"

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message, **details)
        self.headers = {"x-should-retry": "false", **self.headers}


class RequestTooLarge(ServiceError):
    status = 413
    type = "invalid_request_error"
    default_code = "request_too_large"


class RangeNotSatisfiable(ServiceError):
    status = 416
    type = "invalid_request_error"
    default_code = "range_not_satisfiable"


class RateLimited(ServiceError):
    status = 429
    type = "requests"  # OpenAI's word for a limit of requests, not of tokens
    default_code = "rate_limit_exceeded"


class Unavailable(ServiceError):
    status = 503
    default_code = "service_unavailable"

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message, **details)
        self.headers = {"retry-after": "2", **self.headers}


class InferenceUnavailable(Unavailable):
    default_code = "inference_unavailable"


class StorageUnavailable(Unavailable):
    """Object storage can't be reached, fails, or refuses this server; it was asked several times."""

    default_code = "storage_unavailable"

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message, **details)
        self.headers = {**self.headers, "retry-after": "5"}


class ExportInProgress(Unavailable):
    default_code = "export_in_progress"

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message, **details)
        self.headers = {**self.headers, "retry-after": "5"}


class InferenceFailed(ServiceError):
    status = 502
    default_code = "inference_failed"


class InferenceTimeout(ServiceError):
    status = 504
    default_code = "inference_timeout"

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message, **details)
        self.headers = {"x-should-retry": "false", **self.headers}


class ExportFailed(ServiceError):
    default_code = "export_failed"

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message, **details)
        self.headers = {"x-should-retry": "false", **self.headers}


class StorageFull(ServiceError):
    status = 507
    default_code = "storage_full"
