"""Which of a key's scopes a request needs, asked before a byte of its body is read.

All in one list, by path and method. What no line names does not exist, whatever key is shown: a new route that is forgotten
here can't be reached, and a test that walks every route says so.
"""

from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from api.caller import caller_of
from api.error_handlers import no_such_route, render
from core.errors import InsufficientScope
from core.tables.projects import SCOPES, Scope

LOOKING = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing."""
AREAS: tuple[tuple[str, tuple[Scope, ...], tuple[Scope, ...]], ...] = (
    ("/v1/files", ("read",), ("write",)),
    ("/v1/fine_tuning", ("read",), ("write",)),
    ("/v1/models", ("read",), ("write",)),
    ("/v1/webhook_endpoints", ("read",), ("write",)),
    ("/v1/webhook_event_types", ("read",), ()),
    ("/v1/chat/completions", ("infer",), ("infer",)),
    ("/v1/completions", ("infer",), ("infer",)),
    ("/v1/organization", ("admin",), ("admin",)),
    ("/openapi.json", SCOPES, ()),
)
"""A path, with all that is below it; what it takes to look; what it takes to change something. Any one of the scopes will do."""
MORE: dict[tuple[str, str], tuple[Scope, ...]] = {("GET", "/v1/models"): ("read", "infer")}
"""Method and exact path. Chat programs list the models before they ask one."""


def scopes_for(method: str, path: str) -> tuple[Scope, ...]:
    """The scopes of which a request needs one; none where nobody may send it."""
    if (method, path) in MORE:
        return MORE[method, path]
    for area, to_look, to_change in AREAS:
        if path == area or path.startswith(f"{area}/"):
            return to_look if method in LOOKING else to_change
    return ()


class ScopeCheck:
    """Stands behind the authentication, and lets through what that let through without a key."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        caller = caller_of(scope)
        if caller is None:
            await self._app(scope, receive, send)
            return
        needed = scopes_for(scope["method"], scope["path"])
        if not needed:
            await render(no_such_route(scope["method"], scope["path"]))(scope, receive, send)
        elif caller.scopes.isdisjoint(needed):
            where = f"{scope['method']} {scope['path']}"
            message = f"This API key has insufficient permissions for {where}. Missing scope: {' or '.join(needed)}."
            await render(InsufficientScope(message))(scope, receive, send)
        else:
            await self._app(scope, receive, send)
