"""What every list takes: `?limit=`, `?after=`, `?sort=` and filters by equality.

`after` is what the page before gave as `next`: an opaque mark that stays good when rows come and go.
"""

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import falcon

from stratocache.api import query
from stratocache.cache.errors import InvalidInput
from stratocache.fs.pages import Mark, Page

_MARK_CHARACTERS_MAX = 4096
_NUMBER_MAX = 2**63 - 1

Item = TypeVar("Item")


@dataclass(frozen=True)
class Listing:
    """One list: which fields order it, the first unless somebody chooses, and which filter it."""

    orders: tuple[str, ...]
    filters: tuple[str, ...] = ()
    number: str = "number"
    """The field that numbers the items; one of `created_at` when it is made of it."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of all parameters."""
        return ("limit", "after", "sort", *self.filters)

    @property
    def sorts(self) -> tuple[str, ...]:
        """Everything that `sort` may be."""
        return tuple(sign + order for order in self.orders for sign in ("", "-"))

    def page(
        self, request: falcon.Request, *, sort: str | None = None, others: tuple[str, ...] = ()
    ) -> Page:
        """Return the page that a request wants, in the order `sort` unless it says another; others'
        parameters may be there too. Raises `InvalidInput` (`parameter-unknown`,
        `parameter-invalid`)."""
        query.require_known(request, *self.parameters, *others)
        sort = query.choice(request, "sort", *self.sorts) or sort or self.orders[0]
        order = sort.removeprefix("-")
        return Page(
            limit=query.page_length(request),
            order=None if order == self._by_number else order,
            descending=sort.startswith("-"),
            after=self._mark(request, sort),
        )

    def filters_of(self, request: falcon.Request) -> dict[str, str | None]:
        """Return the values of the filters, None where one is absent."""
        return {name: request.get_param(name) for name in self.filters}

    def cut(self, items: Sequence[Item], page: Page) -> tuple[Sequence[Item], str | None]:
        """Return the items of a page, and what leads to the next; None when this is the last."""
        chosen = items[: page.limit]
        if len(items) == len(chosen):
            return chosen, None
        last = chosen[-1]
        order = page.order or self._by_number
        value = "" if page.order is None else getattr(last, page.order)
        mark = [("-" if page.descending else "") + order, "" if value is None else value]
        content = json.dumps([*mark, getattr(last, self.number)], separators=(",", ":"))
        return chosen, base64.urlsafe_b64encode(content.encode()).decode().rstrip("=")

    @property
    def _by_number(self) -> str:
        """The order that the numbers have, which is that of the times of making."""
        return "" if self.number == "id" else "created_at"

    def _mark(self, request: falcon.Request, sort: str) -> Mark | None:
        text = request.get_param("after")
        if not text:
            return None
        try:
            content = base64.b64decode(_padded(text), altchars=b"-_", validate=True)
            found_sort, value, number = json.loads(content)
        except (binascii.Error, ValueError, TypeError, RecursionError):
            raise _invalid_mark() from None
        if found_sort != sort or not (_is_plain(value) and _is_plain(number)):
            raise _invalid_mark()
        return value, number


def _padded(text: str) -> bytes:
    if len(text) > _MARK_CHARACTERS_MAX or not text.isascii():
        raise _invalid_mark()
    return (text + "=" * (-len(text) % 4)).encode()


def _is_plain(value: object) -> bool:
    """Tell whether SQLite takes a value."""
    if isinstance(value, str):
        return not any("\ud800" <= letter <= "\udfff" for letter in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) <= _NUMBER_MAX


def _invalid_mark() -> InvalidInput:
    return InvalidInput(
        "parameter-invalid",
        "after is what next was on the page before, with the same sort.",
        field="after",
    )
