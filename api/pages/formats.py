"""Numbers, times and names as people read them on a page."""

from datetime import UTC, datetime

from stratocache.api.plots import duration
from stratocache.api.sizes import format_size

_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86400
_DAYS_MAX = 30
_SHORT_CHARACTERS, _WHOLE_CHARACTERS = 8, 40


def size(size_bytes: float | None) -> str:
    """Return `1.5 GiB`, a dash when nobody knows."""
    return "—" if size_bytes is None else format_size(int(size_bytes))


def typed_size(size_bytes: int | None) -> str:
    """Return a size as one would type it, `20GiB`, and exactly; empty when there is none."""
    if not size_bytes:
        return "" if size_bytes is None else "0"
    power = next(power for power in (4, 3, 2, 1, 0) if size_bytes % 1024**power == 0)
    return f"{size_bytes // 1024**power}{('', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def exact_size(size_bytes: int | None) -> str:
    """Return `1,610,612,736 bytes`."""
    return "not known" if size_bytes is None else f"{size_bytes:,} bytes"


def percent(ratio: float | None, digits: int = 0) -> str:
    """Return `97 %`, a dash when nobody knows; what is not all is never shown as 100 %."""
    if ratio is None:
        return "—"
    shown = 100 * ratio
    most = 100 - 10**-digits
    return f"{min(shown, most) if ratio < 1 else shown:.{digits}f} %"


def exact_time(at: str) -> str:
    """Return `2026-11-22 08:10:03 UTC` of a time as the database stores it."""
    return datetime.fromisoformat(at).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def relative_time(at: str, now: datetime) -> str:
    """Return `3 min ago` or `in 2 h`; a date for what is more than a month away."""
    moment = datetime.fromisoformat(at)
    difference_s = (now - moment).total_seconds()
    distance_s = abs(difference_s)
    if distance_s < 2:
        return "now"
    if distance_s >= _DAYS_MAX * _DAY_S:
        return moment.astimezone(UTC).strftime("%Y-%m-%d")
    words = _distance(distance_s)
    return f"{words} ago" if difference_s > 0 else f"in {words}"


def _distance(seconds: float) -> str:
    for unit_s, name in ((_DAY_S, "d"), (_HOUR_S, "h"), (_MINUTE_S, "min")):
        if seconds >= unit_s:
            return f"{seconds // unit_s:.0f} {name}"
    return f"{seconds:.0f} s"


def span(seconds: float | None) -> str:
    """Return a length of time for people, a dash when nobody knows."""
    return "—" if seconds is None else duration(seconds)


def short(identifier: str) -> str:
    """Return the part of a UUID or digest that people compare; Marketplace identifiers whole."""
    is_long = identifier[8:9] == "-" or len(identifier) > _WHOLE_CHARACTERS
    return identifier[:_SHORT_CHARACTERS] if is_long else identifier


def count(number: int, one: str, many: str = "") -> str:
    """Return `1 disk` or `3 disks`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
