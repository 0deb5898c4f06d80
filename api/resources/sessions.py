"""`/v1/session`: logging in and out, and who one is."""

import falcon

from stratocache.api import answers, query
from stratocache.api.login import Login, forget_cookie
from stratocache.api.models import SessionCreation, read_body
from stratocache.api.representations import Representation
from stratocache.api.request_origin import require_same_origin
from stratocache.fs.records import SCOPES, Role, Scope
from stratocache.fs.sessions import end_session
from stratocache.fs.state import Database


class SessionView(Representation):
    """Who one is, and what a page of ours needs to change something."""

    name: str
    role: Role
    scopes: list[Scope]
    csrf_token: str | None
    """For `X-CSRF-Token`; None unless the session's cookie was sent."""
    expires_at: str | None
    """When the session ends at the latest."""
    idle_s: float | None
    """It ends, too, when nobody uses it for so long."""


class SessionItem:
    """`/v1/session`."""

    def __init__(self, login: Login, db: Database, idle_s: float) -> None:
        self._login = login
        self._db = db
        self._idle_s = idle_s

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """Tell who the caller is, however that was found out."""
        query.require_known(request)
        answers.show(response, self._view(request))

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        """Log in: 201, and the session's cookie."""
        query.require_known(request)
        require_same_origin(request)
        wanted = read_body(request, SessionCreation)
        self._login.start(request, response, wanted.name, wanted.password)
        answers.show(response, self._view(request), created_at="/v1/session")

    def on_delete(self, request: falcon.Request, response: falcon.Response) -> None:
        """Log out: 204, also for those who have no session."""
        query.require_known(request)
        if request.context.session is not None:
            end_session(self._db, request.context.session.secret)
            forget_cookie(request, response)
        response.status = 204

    def _view(self, request: falcon.Request) -> SessionView:
        caller, session = answers.caller(request), request.context.session
        return SessionView(
            name=caller.name,
            role=caller.role,
            scopes=[scope for scope in SCOPES if scope in caller.scopes],
            csrf_token=session.csrf_token if session else None,
            expires_at=session.expires_at if session else None,
            idle_s=self._idle_s if session else None,
        )
