"""Errors that a client of the inference server sees. Each class carries its status and code.

RequestFailed (500 internal_error)
├── BadRequest (400 invalid_value)
│   ├── Unsupported (400 unsupported_parameter)   known, but this server can't do it
│   ├── ContextExceeded (400 context_length_exceeded)
│   └── AdapterInvalid (400 invalid_adapter)
├── Unauthorised (401 invalid_api_key)
├── NotFound (404 not_found)
│   ├── ModelUnknown (404 model_not_found)
│   └── AdapterUnknown (404 adapter_not_found)
├── AdapterGone (503 adapter_unloaded)             unloaded while it was answering
└── Overloaded (503 overloaded)                    the queue is full, or the server is stopping
"""

from typing import Any, ClassVar


class RequestFailed(Exception):
    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def body(self) -> dict[str, Any]:
        return error_body(self.message, self.type, self.param, self.code)


class BadRequest(RequestFailed):
    status = 400
    type = "invalid_request_error"
    code: ClassVar[str | None] = "invalid_value"


class Unsupported(BadRequest):
    code = "unsupported_parameter"


class ContextExceeded(BadRequest):
    code = "context_length_exceeded"


class AdapterInvalid(BadRequest):
    code = "invalid_adapter"


class Unauthorised(RequestFailed):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class NotFound(RequestFailed):
    status = 404
    type = "invalid_request_error"
    code: ClassVar[str | None] = "not_found"


class ModelUnknown(NotFound):
    code = "model_not_found"


class AdapterUnknown(NotFound):
    code = "adapter_not_found"


class AdapterGone(RequestFailed):
    status = 503
    code = "adapter_unloaded"


class Overloaded(RequestFailed):
    status = 503
    code = "overloaded"


def error_body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
