"""Pages of a table: rows in an order, from where the page before ended.

A page begins behind the *mark* of the last row of the one before: the value of the column that
orders, and the row's number, which decides between equals. So a row that goes, or comes, on the way
moves no other to another page. Names of columns and conditions are this program's own, never a
caller's.
"""

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stratocache.fs.state import Database

Mark = tuple[str | int | float, str | int]
"""The value of the column that orders, and that of the column that decides between equals."""


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list."""

    limit: int
    order: str | None = None
    """A column; None = the number of the row, which is when it was made."""
    descending: bool = False
    after: Mark | None = None
    """None = the first page."""


@dataclass(frozen=True, slots=True)
class Condition:
    """A part of a WHERE clause with its values."""

    text: str
    values: tuple[Any, ...] = ()


EVERYTHING = Condition("1")


def select(
    db: Database,
    table: str,
    number: str,
    *,
    visible: Condition = EVERYTHING,
    equal: Mapping[str, Any] | None = None,
    page: Page | None = None,
) -> list[sqlite3.Row]:
    """Return the rows of a table for which a condition holds, all of them or those of one page and
    one more, if there is one.

    `number` is the column that numbers the rows; `equal` has values of columns, of which None says
    nothing.
    """
    wanted = {column: value for column, value in (equal or {}).items() if value is not None}
    conditions = [visible.text, *(f"{column} = ?" for column in wanted)]
    values = [*visible.values, *wanted.values()]
    order, direction, limit = number, "ASC", -1
    if page is not None:
        limit = page.limit + 1  # one more tells whether there are more
        direction = "DESC" if page.descending else "ASC"
        sign = "<" if page.descending else ">"
        if page.order is not None:
            order = f"coalesce({page.order}, '')"
        if page.after is not None and page.order is None:
            conditions.append(f"{number} {sign} ?")
            values.append(page.after[1])
        elif page.after is not None:
            conditions.append(f"({order}, {number}) {sign} (?, ?)")
            values += page.after
    ordered = (
        f"{order} {direction}" if order == number else f"{order} {direction}, {number} {direction}"
    )
    return db.rows(
        f"SELECT * FROM {table} WHERE {' AND '.join(conditions)} ORDER BY {ordered} LIMIT ?",  # nosec B608 # no value in it
        *values, limit,
    )  # fmt: skip
