"""Who sends a request: found out before any resource sees it (`ACCOUNTS.md`)."""

import re
from dataclasses import replace

import falcon

from stratocache.api.authorisation import RULES
from stratocache.api.identity import caller_of
from stratocache.cache.configuration import ApiSettings
from stratocache.cache.errors import Refused
from stratocache.fs.accounts import find_account
from stratocache.fs.records import Caller
from stratocache.fs.state import Database


class Authentication:
    """Middleware that keeps the caller in the request's context; open routes need none."""

    def __init__(self, settings: ApiSettings, db: Database) -> None:
        self._settings = settings
        self._db = db
        self._open = [
            (method, _pattern(template)) for (method, template), rule in RULES.items() if rule.open
        ]

    def process_request(self, request: falcon.Request, response: falcon.Response) -> None:
        """Find out who asks; raises `HttpProblem` 401 (`not-authenticated`) and `Refused`
        (`account-disabled`)."""
        if not self._is_open(request):
            request.context.caller = self._caller(request)

    def _is_open(self, request: falcon.Request) -> bool:
        return any(
            request.method == method and pattern.fullmatch(request.path)
            for method, pattern in self._open
        )

    def _caller(self, request: falcon.Request) -> Caller:
        caller = caller_of(request.env, self._settings.group)
        if caller.administrator:
            return caller
        account = find_account(self._db, caller.name)
        if account is None:
            return caller
        if not account.enabled:
            raise Refused("account-disabled", f"The account {account.name} is disabled.")
        return replace(caller, role=account.role)


def _pattern(template: str) -> re.Pattern[str]:
    """Return what matches the addresses of a route."""
    parts = re.split(r"\{[^}]*\}", template)
    return re.compile("[^/]+".join(map(re.escape, parts)))
