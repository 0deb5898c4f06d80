"""`/accounts`: who may come over the network, their quotas and tokens."""

from dataclasses import dataclass

import falcon
from markupsafe import Markup

from stratocache.api import answers
from stratocache.api.pages.formats import size
from stratocache.api.pages.pictures import meter
from stratocache.api.pages.rendering import Pages
from stratocache.api.resources.accounts import ACCOUNTS, AccountView, TokenView
from stratocache.fs import accounts, tokens
from stratocache.fs.records import ROLES, SCOPES

_DAYS = (1, 7, 30, 90, 365)
_SCOPE_WORDS = {
    "read": "read everything that the account may see",
    "launch": "launch instances, attach and detach",
    "disks": "create, change and delete disks",
    "images": "fetch, pin and evict images",
    "admin": "accounts, tokens and the audit log",
}


@dataclass(frozen=True, slots=True)
class _Quota:
    """One quota, for people."""

    name: str
    used: str
    limit: str | None
    bar: Markup


class AccountsPage:
    """`/accounts`."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """List accounts by name, and make a new one."""
        db = self._pages.service.db
        part, wanted, order = self._pages.part(request, ACCOUNTS, sort="name")
        chosen, after = ACCOUNTS.cut(accounts.accounts(db, page=part, **wanted), part)
        views = [AccountView.of(db, item) for item in chosen]
        self._pages.show(
            request, response, "accounts", next=after, order=order, roles=ROLES,
            accounts=[(view, _quotas(view)) for view in views], role=wanted["role"] or "",
        )  # fmt: skip


class AccountPage:
    """`/accounts/{name}`."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def on_get(self, request: falcon.Request, response: falcon.Response, name: str) -> None:
        """Show an account with its tokens."""
        db = self._pages.service.db
        view = AccountView.of(db, accounts.account(db, name))
        self._pages.show(
            request, response, "account", account=view, quotas=_quotas(view), roles=ROLES,
            tokens=[TokenView.from_record(item) for item in tokens.tokens(db, name)],
            scopes=[(scope, _SCOPE_WORDS[scope]) for scope in SCOPES], days=_DAYS,
            own=answers.caller(request).name == name,
        )  # fmt: skip


def _quotas(view: AccountView) -> list[_Quota]:
    """Return what an account uses and may use."""
    limit_bytes = view.quota_bytes
    shown = [
        ("Bytes of disks", view.used_bytes, limit_bytes, size(view.used_bytes),
         None if limit_bytes is None else size(limit_bytes)),
        *(
            (name, used, limit, f"{used:,}", None if limit is None else f"{limit:,}")
            for name, used, limit in (
                ("Disks", view.used_disks, view.quota_disks),
                ("Attachments", view.used_attachments, view.quota_attachments),
            )
        ),
    ]  # fmt: skip
    return [
        _Quota(name, used_words, limit_words, meter(f"{name} of {view.name}", used, limit or 0,
               "accent" if limit is None or used < limit else "quarantine"))
        for name, used, limit, used_words, limit_words in shown
    ]  # fmt: skip
