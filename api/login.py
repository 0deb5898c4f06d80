"""Logging in by password: rationed, with the same work whoever is meant, and the cookie it gives."""

import math
from datetime import UTC, datetime

import falcon

from stratocache.api.passwords import is_right
from stratocache.api.problem import HttpProblem
from stratocache.api.request_origin import client_address, is_secure
from stratocache.cache.configuration import ApiSettings
from stratocache.fs.accounts import find_account, password_hash
from stratocache.fs.login_ration import forgive, reserve_attempt
from stratocache.fs.sessions import SESSION_S, Session, start_session
from stratocache.fs.state import Database

_LONG_AGO = datetime(1970, 1, 2, tzinfo=UTC)
_COOKIE = "stratocache"
_HOST_COOKIE = "__Host-stratocache"


class Login:
    """What judges passwords, for the API and for the pages."""

    def __init__(self, settings: ApiSettings, db: Database) -> None:
        self._settings = settings
        self._db = db

    def start(
        self, request: falcon.Request, response: falcon.Response, name: str, password: str
    ) -> Session:
        """Begin a session, whose cookie goes into the answer, as the request's caller.

        Raises `HttpProblem`: 401 (`login-wrong`) and 429 (`login-rationed`); `Unreachable`.
        """
        if not self.judge(request, name, password):
            raise HttpProblem(401, "login-wrong", "Name or password are wrong.")
        account = find_account(self._db, name)
        if account is None:  # deleted meanwhile
            raise HttpProblem(401, "login-wrong", "Name or password are wrong.")
        session = start_session(
            self._db, name, client_address(request, self._settings), self._settings.session_idle_s
        )
        request.context.caller = account.caller
        request.context.session = session
        response.set_cookie(
            cookie_name(request), session.secret, max_age=SESSION_S, path="/",
            secure=is_secure(request), http_only=True, same_site="Strict",
        )  # fmt: skip
        return session

    def judge(self, request: falcon.Request, name: str, password: str) -> bool:
        """Tell whether a password is right; raises `HttpProblem` 429 (`login-rationed`)."""
        address = client_address(request, self._settings)
        known = find_account(self._db, name)
        # a name that nobody has may be a password in the wrong field
        request.context.audit_subject = known.name if known else ""
        wait_s = reserve_attempt(self._db, name, address)
        if wait_s > 0:
            raise HttpProblem(
                429,
                "login-rationed",
                "Too many passwords were wrong; try again later, or use a token.",
                {"Retry-After": str(math.ceil(wait_s))},
            )
        right = is_right(password_hash(self._db, name), password)
        if right:
            forgive(self._db, name, address)
        return right


def cookie_name(request: falcon.Request) -> str:
    """Return what the session's cookie is called; over TLS no other host can set it."""
    return _HOST_COOKIE if is_secure(request) else _COOKIE


def forget_cookie(request: falcon.Request, response: falcon.Response) -> None:
    """Tell the browser that its cookie is worth nothing any more."""
    response.set_cookie(
        cookie_name(request), "", expires=_LONG_AGO, path="/", secure=is_secure(request),
        http_only=True, same_site="Strict",
    )  # fmt: skip
