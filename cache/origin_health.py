"""What origins did lately, and for how long each is left alone for it: one table for all of them.

DEMAND.md has the pauses.
"""

import logging
from collections import defaultdict
from dataclasses import dataclass

import trio

from stratocache.cache.chunk_origins import Unavailable
from stratocache.cache.origin import Backoff

log = logging.getLogger(__name__)

_FIRST_REST_S = 2.0
"""For how long an origin that served something wrong is left alone; doubled each time …"""
_REST_MAX_S = 300.0
"""… up to this."""
_LACKED_MAX = 3
"""How many chunks in a row a store may lack …"""
_LACKING_REST_S = 60.0
"""… until it is left alone for a while, and taken for none: there may be none beside the index."""


@dataclass
class _Note:
    """What one origin did."""

    failures: int = 0
    """In a row, that may pass."""
    wrongs: int = 0
    """That are no accident; every success halves their number."""
    lacked: int = 0
    """Chunks in a row that it does not have."""
    rests_until: float = 0.0
    serves: bool = False
    """Whether it is known to give single chunks."""
    vain: int = 0
    """Requests in a row that brought no chunk."""
    whole: bool = False
    """Whether it answered a range by the whole file."""
    fault: str = ""
    """The last failure, while nothing is known to have worked since."""


class OriginHealth:
    """Failures and successes by location; belongs to one trio loop."""

    def __init__(self, backoff: Backoff) -> None:
        self._backoff = backoff
        self._notes: defaultdict[str, _Note] = defaultdict(_Note)

    def rests_until(self, location: str) -> float:
        """Return the time (`trio.current_time`) until which an origin is left alone."""
        return self._notes[location].rests_until

    def fault(self, location: str) -> str:
        """Return how an origin failed last, empty when it has worked since."""
        return self._notes[location].fault

    def serves(self, location: str) -> bool:
        """Tell whether an origin is known to give single chunks."""
        return self._notes[location].serves

    def was_asked_in_vain(self, location: str) -> bool:
        """Tell whether the last request brought no chunk."""
        return self._notes[location].vain > 0

    def gave_the_whole(self, location: str) -> bool:
        """Tell whether an origin answered a range by the whole file."""
        return self._notes[location].whole

    def failed(self, location: str, error: Unavailable) -> None:
        """Leave an origin alone for a while, one that lacks a chunk when it has lacked several."""
        note = self._notes[location]
        note.vain += 1
        note.whole |= error.kind == "whole"
        if error.kind != "passing" and note.vain >= _LACKED_MAX:
            note.serves = False
        if error.kind == "absent":
            note.lacked += 1
            if note.lacked < _LACKED_MAX:
                return
            note.lacked = 0
            rest_s = _LACKING_REST_S
        elif error.kind != "passing":
            rest_s = min(_REST_MAX_S, _FIRST_REST_S * 2.0**note.wrongs)
            note.wrongs += 1
        else:
            note.failures += 1
            rest_s = self._backoff.pause_s(note.failures, error.retry_after_s)
        note.rests_until = trio.current_time() + rest_s
        note.fault = str(error)
        log.warning("%s: %s; left alone for %.1f s", location, error, rest_s)

    def succeeded(self, location: str) -> None:
        """Take note of right bytes."""
        note = self._notes[location]
        note.failures = note.vain = note.lacked = 0
        note.wrongs //= 2
        note.serves = True
        note.fault = ""

    def answers(self, location: str) -> None:
        """Take note that an origin is there again, which says nothing of what it serves."""
        note = self._notes[location]
        note.failures = 0
        note.fault = ""

    def forget(self, location: str) -> None:
        """Drop what is known of an origin that is no more."""
        self._notes.pop(location, None)
