"""Accounts: who may come over the network, with which role, quotas and secrets.

Every function that writes is one transaction, as in `stratocache.fs.operation_intents`. Passwords come here
as hashes only, tokens and cookies go to the database as digests only.

No change takes from who asks for it what they may: so an administrator is always left.
"""

import hashlib
import re
import sqlite3
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from stratocache.cache import distinguished_name
from stratocache.cache.errors import Conflict, InvalidInput, NotFound, Refused
from stratocache.fs import pages, quotas
from stratocache.fs.records import ROLES, Caller, Role
from stratocache.fs.rights import require_administrator
from stratocache.fs.state import Database, later, now

_LOGIN_NOTED_S = 600.0
SUPERUSER = "root"
"""Whom the Unix socket knows: no account, and no issuer, makes anybody root."""
_FINGERPRINT = re.compile(r"sha256:([0-9A-Fa-f]{2}:?){32}")


@dataclass(frozen=True, slots=True)
class Account:
    """Somebody who may come over the network."""

    name: str
    role: Role
    enabled: bool
    certificate_subject: str | None
    quota_bytes: int | None
    quota_disks: int | None
    quota_attachments: int | None
    created_at: str
    last_login_at: str | None
    has_password: bool

    @property
    def caller(self) -> Caller:
        """What this account may do at most."""
        return Caller(self.name, self.role)


@dataclass(frozen=True, slots=True)
class AccountRequest:
    """An account that somebody wants."""

    name: str
    role: Role = "user"
    password_hash: str | None = None
    certificate_subject: str | None = None
    quota_bytes: int | None = None
    quota_disks: int | None = None
    quota_attachments: int | None = None
    enabled: bool = True


def account_from(row: sqlite3.Row) -> Account:
    """Read an `accounts` row, but for what nobody is shown."""
    fields = {name: row[name] for name in Account.__slots__ if name != "has_password"}
    fields["enabled"] = bool(row["enabled"])
    return Account(**fields, has_password=row["password_hash"] is not None)


def accounts(
    db: Database, *, role: str | None = None, page: pages.Page | None = None
) -> list[Account]:
    """Return all accounts, by name, of one role if given; as `pages.select` with a page."""
    rows = pages.select(db, "accounts", "name", equal={"role": role}, page=page)
    return [account_from(row) for row in rows]


def find_account(db: Database, name: str) -> Account | None:
    """Return an account, or None."""
    row = db.row("SELECT * FROM accounts WHERE name = ?", name)
    return account_from(row) if row else None


def account(db: Database, name: str) -> Account:
    """Return an account; raises `NotFound` (`account-unknown`)."""
    found = find_account(db, name)
    if found is None:
        raise NotFound("account-unknown", f"No account {name}; `stratocache account ls` lists all.")
    return found


def find_by_certificate(db: Database, key: str) -> Account | None:
    """Return the account of a certificate, by a form that `certificate_key` gives, or None."""
    row = db.row("SELECT * FROM accounts WHERE certificate_key = ?", key)
    return account_from(row) if row else None


def password_hash(db: Database, name: str) -> str | None:
    """Return the hash that a password is judged by, None when there is no log-in by password."""
    row = db.row("SELECT password_hash FROM accounts WHERE name = ? AND enabled = 1", name)
    return row["password_hash"] if row else None


def certificate_key(subject: str) -> str:
    """Return the one form of a distinguished name (RFC 4514) or of `sha256:FINGERPRINT`.

    Raises `InvalidInput` (`certificate-subject-invalid`).
    """
    if _FINGERPRINT.fullmatch(subject):
        return "sha256:" + subject.removeprefix("sha256:").replace(":", "").lower()
    try:
        names = distinguished_name.parse(subject)
    except ValueError:
        raise InvalidInput(
            "certificate-subject-invalid",
            "Give a distinguished name such as CN=Jane,O=Example, or sha256: and a fingerprint.",
            field="certificate_subject",
        ) from None
    return key_of_names(names)


def key_of_names(names: distinguished_name.Names) -> str:
    """Return the one form of a distinguished name that has been read."""
    return "dn:" + repr([sorted(relative) for relative in names])


def create_account(
    db: Database, caller: Caller, wanted: AccountRequest, *, first: bool = False
) -> Account:
    """Create an account; with `first` it must be the first, and an administrator's.

    Raises `Conflict` (`account-exists`, `certificate-taken`, `own-rights`), `InvalidInput`, `Refused`
    (`not-allowed`, `first-token-used`, `first-account-not-admin`).
    """
    require_administrator(caller)
    subject = wanted.certificate_subject
    if wanted.name == SUPERUSER:
        raise InvalidInput(
            "account-name-reserved",
            "root is the host's, who needs no account; choose another name.",
            field="name",
        )
    if first and (wanted.role != "admin" or not wanted.enabled):
        raise Refused(
            "first-account-not-admin",
            "The first account is an administrator's: role admin, and enabled.",
        )
    with db.transaction() as connection:
        _require_still(db, caller)
        if first and db.row("SELECT 1 FROM first_token") is None:
            raise Refused("first-token-used", "The first token has been used up; log in.")
        try:
            connection.execute(
                "INSERT INTO accounts (name, role, enabled, password_hash, certificate_subject, "
                "certificate_key, quota_bytes, quota_disks, quota_attachments, created_at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (wanted.name, wanted.role, wanted.enabled, wanted.password_hash, subject,
                 subject and certificate_key(subject), wanted.quota_bytes, wanted.quota_disks,
                 wanted.quota_attachments, now()),
            )  # fmt: skip
        except sqlite3.IntegrityError as error:
            raise _taken(wanted.name, error) from None
        connection.execute("DELETE FROM first_token")
        _require_kept(db, caller)
    return account(db, wanted.name)


def update_account(db: Database, caller: Caller, name: str, changes: dict[str, Any]) -> Account:
    """Change the given columns: role, enabled, password_hash, certificate_subject, quotas.

    A new password, and being disabled, ends all sessions. Users may change their own password,
    which the caller has judged, and nothing else. Raises `NotFound`, `Conflict`
    (`certificate-taken`, `own-rights`), `InvalidInput`, `Refused` (`not-allowed`).
    """
    if caller.name != name or changes.keys() - {"password_hash"}:
        require_administrator(caller)
    columns = dict(changes)
    if "certificate_subject" in columns:
        subject = columns["certificate_subject"]
        columns["certificate_key"] = subject and certificate_key(subject)
    with db.transaction() as connection:
        account(db, name)
        _require_still(db, caller)
        assignments = ", ".join(f"{column} = ?" for column in columns)
        try:
            if columns:
                connection.execute(
                    f"UPDATE accounts SET {assignments} WHERE name = ?",  # nosec B608 # no value in it
                    (*columns.values(), name),
                )
        except sqlite3.IntegrityError as error:
            raise _taken(name, error) from None
        if "password_hash" in changes or changes.get("enabled") is False:
            connection.execute("DELETE FROM sessions WHERE account = ?", (name,))
        _require_kept(db, caller)
    return account(db, name)


def delete_account(db: Database, caller: Caller, name: str) -> None:
    """Delete an account with its tokens, sessions, and what was shared with it.

    Raises `Conflict`: `account-in-use` while it owns disks or attachments, which who gets the name
    next would own, and `own-rights`; `NotFound`, `Refused` (`not-allowed`).
    """
    require_administrator(caller)
    with db.transaction() as connection:
        account(db, name)
        _require_still(db, caller)
        used = quotas.used(connection, name)
        connection.execute("DELETE FROM disk_shares WHERE user = ?", (name,))
        connection.execute("DELETE FROM accounts WHERE name = ?", (name,))
        _require_kept(db, caller)  # first: no use in making it own nothing
        if used.disks or used.attachments:
            raise Conflict(
                "account-in-use",
                f"{name} owns {used.disks} disks and {used.attachments} attachments; give them to "
                "somebody else or delete them first, or disable the account.",
            )


def _require_still(db: Database, caller: Caller) -> None:
    """Raise `Refused` (`not-allowed`) when somebody has lessened the caller since it was known."""
    if _is_less(db, caller):
        raise Refused("not-allowed", "Somebody has just changed your own account; ask again.")


def _require_kept(db: Database, caller: Caller) -> None:
    """Raise `Conflict` (`own-rights`) when this transaction takes from the caller what it may."""
    if _is_less(db, caller):
        raise Conflict(
            "own-rights",
            "This would take away rights of your own, and you could not undo it; ask another "
            "administrator to do it, or root on the host.",
        )


def _is_less(db: Database, caller: Caller) -> bool:
    """Tell whether the caller would have a lesser role, or none, if it came as it did now."""
    role = _role_now(db, caller)
    return role is None or ROLES.index(role) < ROLES.index(caller.role)


def _role_now(db: Database, caller: Caller) -> Role | None:
    if caller.of_host:
        return "admin"
    if caller.fingerprint_key is not None:
        owner = find_by_certificate(db, caller.fingerprint_key)
        if owner is not None and owner.name != caller.name:
            return None
    own = find_account(db, caller.name)
    if own is None:
        return caller.claimed
    return own.role if own.enabled else None


def note_login(connection: sqlite3.Connection, name: str) -> None:
    """Record that somebody has logged in, within the caller's transaction."""
    connection.execute("UPDATE accounts SET last_login_at = ? WHERE name = ?", (now(), name))


def note_certificate(db: Database, account: Account) -> None:
    """Record that somebody came with a certificate, unless that was recorded minutes ago."""
    if (account.last_login_at or "") < later(-_LOGIN_NOTED_S):
        # a full disk keeps nobody from reading
        with suppress(sqlite3.OperationalError), db.transaction() as connection:
            note_login(connection, account.name)


def digest_of(secret: str) -> str:
    """Return what is stored of a token or a cookie: it has 256 random bits, so no salt is needed."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _taken(name: str, error: sqlite3.IntegrityError) -> Conflict:
    if "certificate_key" in str(error):
        return Conflict(
            "certificate-taken", "Another account has this certificate subject.",
        )  # fmt: skip
    return Conflict("account-exists", f"There is an account {name} already.")
