"""`/v1/accounts`: who may come over the network, and their tokens."""

from typing import Any, Self

import falcon

from stratocache.api import answers, query
from stratocache.api.listing import Listing
from stratocache.api.login import Login
from stratocache.api.models import AccountChange, AccountCreation, TokenCreation, read_body
from stratocache.api.passwords import hash_password
from stratocache.api.problem import HttpProblem
from stratocache.api.representations import Representation
from stratocache.api.service import Service
from stratocache.cache.errors import InvalidInput, Refused
from stratocache.fs import accounts, quotas, tokens
from stratocache.fs.accounts import Account, AccountRequest
from stratocache.fs.records import Caller, Role, Scope
from stratocache.fs.state import Database

ACCOUNTS = Listing(orders=("name",), filters=("role",), number="name")
TOKENS = Listing(orders=("created_at",), number="id")
_OWN_FIELDS = {"password", "current_password"}


class AccountView(Representation):
    """An account, without what it proves itself by; quotas that are null are none."""

    name: str
    role: Role
    enabled: bool
    created_at: str
    last_login_at: str | None
    has_password: bool
    certificate_subject: str | None
    quota_bytes: int | None
    quota_disks: int | None
    quota_attachments: int | None
    used_bytes: int
    used_disks: int
    used_attachments: int

    @classmethod
    def of(cls, db: Database, account: Account) -> Self:
        """Show an account."""
        used = quotas.used(db.connection, account.name)
        return cls.from_record(
            account,
            used_bytes=used.bytes,
            used_disks=used.disks,
            used_attachments=used.attachments,
        )


class TokenView(Representation):
    """A token, without the token."""

    id: str
    description: str
    scopes: list[Scope]
    created_at: str
    expires_at: str | None
    last_used_at: str | None


class NewTokenView(TokenView):
    """A token that has just been made: the only answer that has it."""

    token: str


class AccountCollection:
    """`/v1/accounts`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """List accounts by name; `?role=` chooses."""
        db, page = self._service.db, ACCOUNTS.page(request)
        found = accounts.accounts(db, page=page, **ACCOUNTS.filters_of(request))
        chosen, after = ACCOUNTS.cut(found, page)
        answers.show_page(
            response, "accounts", [AccountView.of(db, item) for item in chosen], after
        )

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        """Create an account: 201."""
        query.require_known(request)
        wanted = read_body(request, AccountCreation)
        fields = wanted.model_dump(exclude={"password"})
        db, caller = self._service.db, answers.caller(request)
        hashed = None if wanted.password is None else hash_password(wanted.password)
        account = accounts.create_account(
            db, caller, AccountRequest(**fields, password_hash=hashed), first=request.context.first
        )
        self._service.configuration.first_token_file.unlink(missing_ok=True)
        answers.show(
            response, AccountView.of(db, account), created_at=f"/v1/accounts/{account.name}"
        )


class AccountItem:
    """`/v1/accounts/{name}`."""

    def __init__(self, service: Service, login: Login) -> None:
        self._service = service
        self._login = login

    def on_get(self, request: falcon.Request, response: falcon.Response, name: str) -> None:
        """Show an account and what it uses of its quotas."""
        query.require_known(request)
        answers.show(response, _present(self._service.db, name))

    def on_patch(self, request: falcon.Request, response: falcon.Response, name: str) -> None:
        """Change an account; users change their password, and say what it was."""
        query.require_known(request)
        wanted = read_body(request, AccountChange)
        db, caller = self._service.db, answers.caller(request)
        self._judge(request, caller, accounts.account(db, name), wanted)
        columns = _columns(wanted)
        with answers.matching(request, db, lambda: _present(db, name)):
            changed = accounts.update_account(db, caller, name, columns)
        answers.show(response, AccountView.of(db, changed))

    def on_delete(self, request: falcon.Request, response: falcon.Response, name: str) -> None:
        """Delete an account that owns nothing: 204."""
        query.require_known(request)
        db = self._service.db
        with answers.matching(request, db, lambda: _present(db, name)):
            accounts.delete_account(db, answers.caller(request), name)
        response.status = 204

    def _judge(
        self, request: falcon.Request, caller: Caller, account: Account, wanted: AccountChange
    ) -> None:
        """Raise unless the caller may change this of the account; costs a log-in for one's own."""
        beyond = sorted(wanted.model_fields_set - _OWN_FIELDS)
        if beyond and not caller.administrator:
            raise Refused("not-allowed", f"Only administrators change {beyond[0]}.")
        own = caller.name == account.name and account.has_password
        if not (own and "password" in wanted.model_fields_set):
            return
        if wanted.current_password is None:
            raise InvalidInput(
                "field-missing", "Give the present password too.", field="current_password"
            )
        if not self._login.judge(request, account.name, wanted.current_password):
            raise HttpProblem(403, "password-wrong", "The present password is another.")


class TokenCollection:
    """`/v1/accounts/{name}/tokens`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response, name: str) -> None:
        """List an account's tokens, oldest first."""
        db, page = self._service.db, TOKENS.page(request)
        accounts.account(db, name)
        chosen, after = TOKENS.cut(tokens.tokens(db, name, page=page), page)
        views = [TokenView.from_record(item) for item in chosen]
        answers.show_page(response, "tokens", views, after)

    def on_post(self, request: falcon.Request, response: falcon.Response, name: str) -> None:
        """Make a token: 201, and the token, which is never shown again."""
        query.require_known(request)
        wanted = read_body(request, TokenCreation)
        made, secret = tokens.create_token(
            self._service.db,
            answers.caller(request),
            name,
            description=wanted.description,
            scopes=wanted.scopes,
            expires_in_s=wanted.expires_in_s,
        )
        view = NewTokenView.from_record(made, token=secret)
        answers.show(response, view, created_at=f"/v1/accounts/{name}/tokens/{made.id}")
        response.cache_control = ["no-store"]


class TokenItem:
    """`/v1/accounts/{name}/tokens/{token_id}`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_delete(
        self, request: falcon.Request, response: falcon.Response, name: str, token_id: str
    ) -> None:
        """Make a token worthless: 204."""
        query.require_known(request)
        tokens.delete_token(self._service.db, answers.caller(request), name, token_id)
        response.status = 204


def _present(db: Database, name: str) -> AccountView:
    return AccountView.of(db, accounts.account(db, name))


def _columns(wanted: AccountChange) -> dict[str, Any]:
    """Return the columns of the table that a change gives; raises `InvalidInput`."""
    columns = wanted.model_dump(include=wanted.model_fields_set - _OWN_FIELDS)
    for name in ("role", "enabled"):
        if name in columns and columns[name] is None:
            raise InvalidInput("field-invalid", f"Field {name!r} cannot be null.", field=name)
    if "password" in wanted.model_fields_set:
        password = wanted.password
        columns["password_hash"] = None if password is None else hash_password(password)
    return columns
