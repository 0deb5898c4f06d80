"""Who sends a request: found out before any resource sees it (`ACCOUNTS.md`)."""

import ssl
from dataclasses import replace
from typing import TYPE_CHECKING

import falcon

from stratocache.api.authorisation import is_open
from stratocache.api.identity import caller_of
from stratocache.api.login import cookie_name
from stratocache.api.problem import HttpProblem
from stratocache.api.request_origin import is_unix, require_csrf_token
from stratocache.cache import distinguished_name
from stratocache.cache.configuration import ApiSettings
from stratocache.cache.errors import Refused
from stratocache.fs.accounts import (
    Account,
    find_account,
    find_by_certificate,
    key_of_names,
    note_certificate,
)
from stratocache.fs.records import Caller
from stratocache.fs.sessions import Session, judge_session
from stratocache.fs.state import Database
from stratocache.fs.tokens import PREFIX, is_first_token, judge_token

if TYPE_CHECKING:
    from stratocache.api.oidc import Issuers
    from stratocache.api.revocation import RevocationLists

_FIRST = ("POST", "/v1/accounts")
"""All that the token of the first start is good for."""
TIMER_HEADER = "X-Stratocache-Timer"
"""Of reading that our pages do by themselves: it keeps no session alive."""


class Authentication:
    """Middleware that keeps the caller in the request's context; open routes need none.

    In this order: a token in `Authorization`, the session's cookie, the client's certificate; on the
    Unix socket a token, else what the kernel says.
    """

    def __init__(self, settings: ApiSettings, db: Database) -> None:
        self._settings = settings
        self._db = db
        self._issuers = _issuers(settings)
        self._revocation = _revocation(settings)

    def process_request(self, request: falcon.Request, response: falcon.Response) -> None:
        """Find out who asks; raises `HttpProblem` 401 (`not-authenticated`) and 403
        (`csrf-token-wrong`, `origin-foreign`), `Refused` (`account-disabled`), `Unreachable`."""
        request.context.session = None
        request.context.first = False
        request.context.caller = None
        if not is_open(request.method, request.path):
            request.context.caller = self._caller(request)

    def _caller(self, request: falcon.Request) -> Caller:
        if request.auth:
            return self._bearer(request, request.auth)
        if is_unix(request):
            return self._local(request)
        cookies = request.get_cookie_values(cookie_name(request))
        found = self._session(request, cookies[0]) if cookies else None
        if found is not None:
            account, session = found
            request.context.audit_user = account.name
            require_csrf_token(request, session)
            request.context.session = session
            return account.caller
        known = self._certified(request)
        if known is not None:
            return known
        raise _unknown("Log in, or send a token: Authorization: Bearer TOKEN.")

    def _session(self, request: falcon.Request, cookie: str) -> tuple[Account, Session] | None:
        by_timer = request.get_header(TIMER_HEADER) is not None and request.method == "GET"
        return judge_session(self._db, cookie, self._settings.session_idle_s, by_timer=by_timer)

    def _bearer(self, request: falcon.Request, header: str) -> Caller:
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise _unknown("Send a token as Authorization: Bearer TOKEN; nothing else is taken.")
        if token.startswith(PREFIX):
            found = judge_token(self._db, token)
            if found is not None:
                account, scopes = found
                return Caller(account.name, account.role, scopes)
            if (request.method, request.path) == _FIRST and is_first_token(self._db, token):
                request.context.first = True
                return Caller("first-start", "admin", frozenset({"admin"}), claimed="admin")
        elif self._issuers is not None:
            return self._claimed(self._issuers, token)
        raise _unknown("This token is not known here, has expired, or its account is disabled.")

    def _claimed(self, issuers: "Issuers", token: str) -> Caller:
        from stratocache.api.oidc import TokenRefused

        try:
            caller = issuers.identify(token)
        except TokenRefused as refused:
            raise _unknown(f"This token is not believed: {refused}.") from None
        return self._with_account(caller)

    def _local(self, request: falcon.Request) -> Caller:
        caller = caller_of(request.env, self._settings.group)
        if caller.administrator:
            return replace(caller, of_host=True)
        return self._with_account(caller)

    def _with_account(self, caller: Caller) -> Caller:
        """Return somebody whom others name, with the role of their account, if they have one."""
        caller = replace(caller, claimed=caller.role)
        account = find_account(self._db, caller.name)
        if account is None:
            return caller
        if not account.enabled:
            raise Refused("account-disabled", f"The account {account.name} is disabled.")
        return replace(caller, role=account.role)

    def _certified(self, request: falcon.Request) -> Caller | None:
        """Return whose account has the certificate that the client has proven to have, if any.

        Raises `HttpProblem` 401 (`certificate-revoked`) and `Unreachable`.
        """
        connection = request.env.get("gunicorn.socket")
        if self._settings.client_ca_file is None or not isinstance(connection, ssl.SSLSocket):
            return None
        der = connection.getpeercert(binary_form=True)
        if der is None:
            return None
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes

        certificate = x509.load_der_x509_certificate(der)
        names = distinguished_name.of_certificate(certificate.subject)
        fingerprint_key = f"sha256:{certificate.fingerprint(hashes.SHA256()).hex()}"
        account = find_by_certificate(self._db, fingerprint_key) or find_by_certificate(
            self._db, key_of_names(names)
        )
        if account is None or not account.enabled:
            return None
        if self._revocation is not None:
            request.context.audit_user = account.name
            self._revocation.require_valid(certificate)
        note_certificate(self._db, account)
        return replace(account.caller, fingerprint_key=fingerprint_key)


def _issuers(settings: ApiSettings) -> "Issuers | None":
    if not settings.oidc:
        return None
    from stratocache.api.oidc import Issuers  # only where somebody is believed

    return Issuers(settings.oidc)


def _revocation(settings: ApiSettings) -> "RevocationLists | None":
    if settings.client_ca_file is None or settings.client_crl_file is None:
        return None
    from stratocache.api.revocation import RevocationLists

    return RevocationLists(settings.client_crl_file, settings.client_ca_file)


def _unknown(sentence: str) -> HttpProblem:
    return HttpProblem(401, "not-authenticated", sentence, {"WWW-Authenticate": "Bearer"})
