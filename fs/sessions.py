"""Sessions of browsers: who logged in by password, until they log out or the session ends: after
twelve hours, or when nobody has used it for a while."""

import secrets
import sqlite3
from contextlib import suppress
from dataclasses import dataclass

from stratocache.fs.accounts import Account, digest_of, find_account, note_login
from stratocache.fs.state import Database, later, now

SESSION_S = 12 * 3600
"""How long a session lasts, whatever is done in it."""
SESSIONS_MAX = 32
"""Of one account; the oldest goes."""
_NOTED_S = 60
"""Uses within so short a time, or a tenth of the limit, are one: each that is noted is a write."""
_SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class Session:
    """A session; its cookie is `secret`."""

    secret: str
    expires_at: str

    @property
    def csrf_token(self) -> str:
        """What a page of ours knows and no other page can: follows from the cookie."""
        return digest_of("csrf " + self.secret)


def start_session(db: Database, name: str, address: str, idle_s: float) -> Session:
    """Begin a session of somebody whose password was right; those that have ended are forgotten."""
    session = Session(secrets.token_urlsafe(_SECRET_BYTES), later(SESSION_S))
    with db.transaction() as connection:
        connection.execute(
            "DELETE FROM sessions WHERE expires_at <= ? OR used_at <= ?", (now(), later(-idle_s))
        )
        connection.execute(
            "DELETE FROM sessions WHERE account = ?1 AND digest NOT IN (SELECT digest FROM sessions "
            "WHERE account = ?1 ORDER BY created_at DESC LIMIT ?2)",
            (name, SESSIONS_MAX - 1),
        )
        connection.execute(
            "INSERT INTO sessions (digest, account, address, created_at, used_at, expires_at) "
            "VALUES (?1, ?2, ?3, ?4, ?4, ?5)",
            (digest_of(session.secret), name, address, now(), session.expires_at),
        )
        note_login(connection, name)
    return session


def judge_session(
    db: Database, secret: str, idle_s: float, *, by_timer: bool = False
) -> tuple[Account, Session] | None:
    """Return whose session a cookie is of; None when it is of none, or of one that has ended.

    That is a use of it, unless a timer asks instead of somebody.
    """
    row = db.row(
        "SELECT account, expires_at, used_at FROM sessions "
        "WHERE digest = ? AND expires_at > ? AND used_at > ?",
        digest_of(secret),
        now(),
        later(-idle_s),
    )
    owner = find_account(db, row["account"]) if row else None
    if row is None or owner is None or not owner.enabled:
        return None
    if not by_timer and row["used_at"] < later(-min(_NOTED_S, idle_s / 10)):
        _note_use(db, secret)
    return owner, Session(secret, row["expires_at"])


def _note_use(db: Database, secret: str) -> None:
    # a full disk keeps nobody from reading
    with suppress(sqlite3.OperationalError), db.transaction() as connection:
        connection.execute(
            "UPDATE sessions SET used_at = max(used_at, ?) WHERE digest = ?",
            (now(), digest_of(secret)),
        )


def end_session(db: Database, secret: str) -> None:
    """Make a cookie worthless; done twice it is no error."""
    with db.transaction() as connection:
        connection.execute("DELETE FROM sessions WHERE digest = ?", (digest_of(secret),))
