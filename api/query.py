"""Query parameters: waiting, paging, filters; unknown ones are refused by name."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import falcon

from stratocache.cache.errors import InvalidInput

WAIT_S_MAX = 600
PAGE_LENGTH = 100
PAGE_LENGTH_MAX = 1000
_NUMBER_DIGITS = 20
_EPOCH_DIGITS_MAX = 18
_NUMBER_MAX = 2**63 - 1

Item = TypeVar("Item")


def require_known(request: falcon.Request, *names: str) -> None:
    """Raise `InvalidInput` (`parameter-unknown`) when the query has a name not in `names`."""
    for name in request.params:
        if name not in names:
            raise InvalidInput(
                "parameter-unknown", f"There is no parameter {name!r} here; remove it.", field=name
            )


def wait_seconds(request: falcon.Request, default: float) -> float:
    """Return `?wait=`, a number of seconds from 0 to 600; raises `InvalidInput`."""
    text = request.get_param("wait")
    if text is None:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds <= WAIT_S_MAX:  # also refuses NaN
        raise InvalidInput(
            "parameter-invalid",
            f"wait is a number of seconds from 0 to {WAIT_S_MAX}.",
            field="wait",
        )
    return seconds


def choice(request: falcon.Request, name: str, *allowed: str) -> str | None:
    """Return a parameter that has one of a few values, None when it is absent.

    Raises `InvalidInput` (`parameter-invalid`).
    """
    text = request.get_param(name)
    if text is not None and text not in allowed:
        raise InvalidInput(
            "parameter-invalid", f"{name} is one of: {', '.join(allowed)}.", field=name
        )
    return text


def epoch(request: falcon.Request) -> int | None:
    """Return `?epoch=`, None when it is absent; raises `InvalidInput` (`parameter-invalid`)."""
    text = request.get_param("epoch")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= _EPOCH_DIGITS_MAX):
        raise InvalidInput("parameter-invalid", "epoch is a whole number.", field="epoch")
    return int(text)


def whole_number(request: falcon.Request, name: str, most: int) -> int | None:
    """Return a parameter from 1 to `most`, None when it is absent; raises `InvalidInput`
    (`parameter-invalid`)."""
    text = request.get_param(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:_NUMBER_DIGITS]) <= most):
        raise InvalidInput("parameter-invalid", f"{name} is a number from 1 to {most}.", field=name)
    return int(text)


def page(
    request: falcon.Request, items: Iterable[Item], cursor_of: Callable[[Item], str]
) -> tuple[list[Item], str | None]:
    """Return the items that `?after=` and `?limit=` select, and the cursor of the next page.

    Items are ordered by their cursor. A cursor stays good when its item is gone. Raises
    `InvalidInput` (`parameter-invalid`).
    """
    limit, after = _limits(request)
    ordered = sorted((cursor_of(item), item) for item in items)
    rest = [(cursor, item) for cursor, item in ordered if cursor > after]
    chosen = [item for _cursor, item in rest[:limit]]
    return chosen, (rest[limit - 1][0] if len(rest) > limit else None)


def numbered_page(
    request: falcon.Request,
    select: Callable[[int, int], list[Item]],
    number_of: Callable[[Item], int],
) -> tuple[list[Item], str | None]:
    """Do as `page` for items that have numbers, without reading those of other pages.

    `select` returns at most as many as its second argument, in order, of a number greater than its
    first. Raises `InvalidInput` (`parameter-invalid`).
    """
    limit, after = _limits(request)
    if after and not (after.isascii() and after.isdigit() and len(after) <= _NUMBER_DIGITS):
        raise InvalidInput(
            "parameter-invalid", "after is what next was on the page before.", field="after"
        )
    items = select(min(int(after or "0"), _NUMBER_MAX), limit + 1)
    chosen = items[:limit]
    more = len(items) > limit
    return chosen, f"{number_of(chosen[-1]):0{_NUMBER_DIGITS}d}" if more else None


def _limits(request: falcon.Request) -> tuple[int, str]:
    text = request.get_param("limit") or str(PAGE_LENGTH)
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:5]) <= PAGE_LENGTH_MAX):
        raise InvalidInput(
            "parameter-invalid", f"limit is a number from 1 to {PAGE_LENGTH_MAX}.", field="limit"
        )
    return int(text), request.get_param("after") or ""
