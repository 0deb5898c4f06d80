"""Tokens of accounts: what programs show instead of a password, and the one of the first start."""

import json
import os
import secrets
import sqlite3
import uuid as uuid_module
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stratocache.cache.errors import Conflict, NotFound, Refused
from stratocache.fs import pages
from stratocache.fs.accounts import Account, account, digest_of, find_account
from stratocache.fs.records import SCOPES, Caller, Scope
from stratocache.fs.rights import require_administrator
from stratocache.fs.state import Database, later, now

PREFIX = "sct_"
TOKENS_MAX = 100
"""Of one account."""
_SECRET_BYTES = 32
_USE_NOTED_S = 600.0
"""A use is written down when the last that was is older: reading must not cost a write each time."""


@dataclass(frozen=True, slots=True)
class Token:
    """What is known of a token, which is not stored."""

    id: str
    account: str
    description: str
    scopes: tuple[Scope, ...]
    created_at: str
    expires_at: str | None
    last_used_at: str | None


def tokens(db: Database, name: str, *, page: pages.Page | None = None) -> list[Token]:
    """Return the tokens of an account, those too that have expired; as `pages.select` with a page."""
    rows = pages.select(db, "tokens", "id", equal={"account": name}, page=page)
    return [_token_from(row) for row in rows]


def create_token(
    db: Database,
    caller: Caller,
    name: str,
    *,
    description: str = "",
    scopes: Collection[Scope],
    expires_in_s: int | None = None,
) -> tuple[Token, str]:
    """Make a token of an account, one's own unless one is an administrator; return it, once.

    Raises `NotFound`, `Conflict` (`tokens-too-many`), `Refused` (`scope-missing` for a token that
    could do more than the one it is asked for with).
    """
    if caller.name != name:
        require_administrator(caller)
    beyond = sorted(set(scopes) - caller.scopes)
    if beyond:
        raise Refused("scope-missing", f"This token cannot give the scope {beyond[0]}.")
    secret = new_secret()
    token_id = str(uuid_module.uuid4())
    expires_at = None if expires_in_s is None else later(expires_in_s)
    with db.transaction() as connection:
        account(db, name)
        if len(tokens(db, name)) >= TOKENS_MAX:
            raise Conflict("tokens-too-many", f"{name} has {TOKENS_MAX} tokens; delete some first.")
        connection.execute(
            "INSERT INTO tokens (id, account, digest, description, scopes, created_at, expires_at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (token_id, name, digest_of(secret), description,
             json.dumps([scope for scope in SCOPES if scope in scopes]), now(), expires_at),
        )  # fmt: skip
    return token(db, name, token_id), secret


def token(db: Database, name: str, token_id: str) -> Token:
    """Return one token of an account; raises `NotFound` (`token-unknown`)."""
    row = db.row("SELECT * FROM tokens WHERE account = ? AND id = ?", name, token_id)
    if row is not None:
        return _token_from(row)
    raise NotFound("token-unknown", f"{name} has no token {token_id}.")


def delete_token(db: Database, caller: Caller, name: str, token_id: str) -> None:
    """Make a token worthless; raises `NotFound` and `Refused`."""
    if caller.name != name:
        require_administrator(caller)
    with db.transaction() as connection:
        token(db, name, token_id)
        connection.execute("DELETE FROM tokens WHERE id = ?", (token_id,))


def judge_token(db: Database, secret: str) -> tuple[Account, frozenset[Scope]] | None:
    """Return whose token this is, and what it is good for; None when it is worth nothing."""
    row = db.row(
        "SELECT id, account, scopes, last_used_at FROM tokens "
        "WHERE digest = ? AND (expires_at IS NULL OR expires_at > ?)",
        digest_of(secret),
        now(),
    )
    owner = find_account(db, row["account"]) if row else None
    if row is None or owner is None or not owner.enabled:
        return None
    if (row["last_used_at"] or "") < later(-_USE_NOTED_S):
        # a full disk keeps nobody from reading
        with suppress(sqlite3.OperationalError), db.transaction() as connection:
            connection.execute(
                "UPDATE tokens SET last_used_at = ? WHERE id = ?", (now(), row["id"])
            )
    return owner, frozenset(json.loads(row["scopes"]))


def _token_from(row: sqlite3.Row) -> Token:
    fields = {name: row[name] for name in Token.__slots__ if name != "scopes"}
    return Token(**fields, scopes=tuple(json.loads(row["scopes"])))


def new_secret() -> str:
    """Return a token that was never used."""
    return PREFIX + secrets.token_urlsafe(_SECRET_BYTES)


# -- the first start


def offer_first_token(db: Database, path: Path) -> str | None:
    """Return the token that the first administrator's account is made with; None when there is an
    account. It is in the file at `path`, mode 0600, and stays the same until it is used.

    Raises `OSError`.
    """
    with db.transaction() as connection:
        if db.row("SELECT 1 FROM accounts") is not None:
            connection.execute("DELETE FROM first_token")
            path.unlink(missing_ok=True)
            return None
        with suppress(OSError):
            kept = path.read_text(errors="replace").strip()
            if is_first_token(db, kept):
                return kept
        secret = new_secret()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secret + "\n")
        connection.execute(
            "INSERT OR REPLACE INTO first_token (id, digest) VALUES (1, ?)", (digest_of(secret),)
        )
    return secret


def is_first_token(db: Database, secret: str) -> bool:
    """Tell whether this is the token of the first start, and still good."""
    return db.row("SELECT 1 FROM first_token WHERE digest = ?", digest_of(secret)) is not None
