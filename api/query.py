"""Query parameters: waiting, paging, filters; unknown ones are refused by name."""

import falcon

from stratocache.cache.errors import InvalidInput

WAIT_S_MAX = 600
PAGE_LENGTH = 100
PAGE_LENGTH_MAX = 1000
_NUMBER_DIGITS = 20
_EPOCH_DIGITS_MAX = 18


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


def page_length(request: falcon.Request) -> int:
    """Return `?limit=`; raises `InvalidInput` (`parameter-invalid`)."""
    return whole_number(request, "limit", PAGE_LENGTH_MAX) or PAGE_LENGTH


def event_number(text: str | None, field: str) -> int | None:
    """Return a number of an event, 0 for before the first, None when there is none.

    Raises `InvalidInput` (`parameter-invalid`).
    """
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= _EPOCH_DIGITS_MAX):
        raise InvalidInput("parameter-invalid", f"{field} is the number of an event.", field=field)
    return int(text)
