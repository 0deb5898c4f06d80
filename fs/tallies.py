"""Counters that outlive processes and reboots: the table `tallies`, in the caller's transaction.

Events and operations are counted there by triggers (`stratocache.fs.schema`), so that no path can
forget to.
"""

import sqlite3

from stratocache.fs.state import Database


def add_tally(connection: sqlite3.Connection, name: str, value: float, label: str = "") -> None:
    """Add to a counter."""
    connection.execute(
        "INSERT INTO tallies (name, label, value) VALUES (?, ?, ?) "
        "ON CONFLICT (name, label) DO UPDATE SET value = value + excluded.value",
        (name, label, value),
    )


def tallies(db: Database) -> dict[str, dict[str, float]]:
    """Return every counter: by name, then by label."""
    found: dict[str, dict[str, float]] = {}
    for row in db.rows("SELECT name, label, value FROM tallies"):
        found.setdefault(row["name"], {})[row["label"]] = row["value"]
    return found
