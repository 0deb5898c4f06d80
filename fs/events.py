"""Reading events: what happened, to those whose it is."""

from dataclasses import dataclass

from stratocache.fs import pages
from stratocache.fs.pages import Condition, Page
from stratocache.fs.records import Caller
from stratocache.fs.state import Database

_SHARED_KINDS = "image."
"""Events of images are everybody's, as images are."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened."""

    number: int
    at: str
    kind: str
    subject: str
    message: str
    owner: str | None
    """Whose the subject was; None = nobody's."""


def events(
    db: Database,
    caller: Caller,
    page: Page,
    *,
    kind: str | None = None,
    subject: str | None = None,
) -> list[Event]:
    """Return a page of the events that the caller may see, and one more if there is one.

    With `kind` those of kinds that begin so, with `subject` those of one image, disk, snapshot,
    attachment or instance.
    """
    conditions: list[str] = ["1"]
    values: list[str | int] = []
    if not caller.operator:
        conditions.append(f"(owner = ? OR kind LIKE '{_SHARED_KINDS}%')")
        values.append(caller.name)
    if kind is not None:
        conditions.append("substr(kind, 1, ?) = ?")
        values += [len(kind), kind]
    visible = Condition(" AND ".join(conditions), tuple(values))
    rows = pages.select(
        db, "events", "number", visible=visible, equal={"subject": subject}, page=page
    )
    return [Event(**dict(row)) for row in rows]


def latest_number(db: Database) -> int:
    """Return the number of the last event that was recorded; 0 before the first."""
    row = db.row("SELECT max(number) FROM events")
    return (row[0] if row else None) or 0
