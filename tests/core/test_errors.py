import re

import pytest

from core import errors
from core.errors import BadRequest, Conflict, InferenceUnavailable, InvalidFile, RateLimited, ServiceError, StorageUnavailable, Unavailable


def descendants(parent: type[ServiceError]) -> list[type[ServiceError]]:
    return [found for child in parent.__subclasses__() if child.__module__ == "core.errors" for found in (child, *descendants(child))]


def test_tree_in_the_docstring_is_the_tree() -> None:
    drawn = re.findall(r"─ (\w+) \((\d+)", errors.__doc__ or "")
    assert sorted(drawn) == sorted((error.__name__, str(error.status)) for error in descendants(ServiceError))


@pytest.mark.parametrize("error", descendants(ServiceError), ids=lambda error: error.__name__)
def test_status_and_type_fit_together(error: type[ServiceError]) -> None:
    expected = "requests" if error is RateLimited else "invalid_request_error" if error.status < 500 else "server_error"
    assert error.type == expected


def test_body_is_as_the_client_expects() -> None:
    error = InvalidFile("line 3: no", param="file", extra={"problems": [{"line": 3}]})
    body = {"message": "line 3: no", "type": "invalid_request_error", "param": "file", "code": "invalid_training_file", "problems": [{"line": 3}]}
    assert error.body() == {"error": body}
    assert str(error) == "line 3: no"
    assert BadRequest("no").body()["error"]["code"] is None
    assert BadRequest("no", code="special").body()["error"]["code"] == "special"


def test_headers_tell_clients_whether_to_retry() -> None:
    assert Conflict("no").headers == {"x-should-retry": "false"}
    assert Unavailable("busy").headers == {"retry-after": "2"}
    assert StorageUnavailable("away").headers == {"retry-after": "5"}
    assert InferenceUnavailable("busy", headers={"retry-after": "9"}).headers == {"retry-after": "9"}
