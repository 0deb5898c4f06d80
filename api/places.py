"""Places for what takes long: so many in each worker, of which every caller may have a share.

A transfer or a stream takes a place, and with it a thread of its own: threads for all else stay free.
Who holds as many as one caller may is told so; the last places are for callers who have none. Who
comes when there is no place waits for a moment, if not too many wait already.
"""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from stratocache.api.problem import HttpProblem
from stratocache.cache.errors import Unreachable

_SHARE = 2
"""A caller has at most one of so many places, and waits for as many."""
_SPARE = 4
"""One of so many places is kept for callers who have none."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What places are for, in words and in a stable code."""

    code: str
    """Of the problem of a caller who has too many."""
    plural: str
    advice: str
    """What such a caller is to do."""
    wait_s: float
    """How long a place is waited for."""
    retry_after_s: int


class Places:
    """The places of one worker for one kind of work. Any thread may take one."""

    def __init__(self, kind: Kind, number: int) -> None:
        self._kind = kind
        self._number = number
        self._share = max(1, number // _SHARE)
        self._spare = number // _SPARE
        self._condition = threading.Condition()
        self._holding: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()

    @property
    def threads(self) -> int:
        """How many threads those who hold a place and those who wait for one take at most."""
        return 2 * self._number

    @property
    def waiting(self) -> int:
        """How many wait for a place."""
        with self._condition:
            return self._waiting.total()

    def take(self, caller: str) -> Callable[[], None]:
        """Take a place; return what gives it back, which may be called twice.

        Raises `HttpProblem` 429 when the caller has too many, `Unreachable` (`server-busy`) when
        others have all.
        """
        with self._condition:
            if not (self._is_free_for(caller) or self._wait(caller)):
                raise self._refusal(self._holding[caller])
            self._holding[caller] += 1
        given_back = False

        def give_back() -> None:
            nonlocal given_back
            with self._condition:
                if not given_back:
                    given_back = True
                    _subtract(self._holding, caller)
                    self._condition.notify_all()

        return give_back

    def _is_free_for(self, caller: str) -> bool:
        mine, free = self._holding[caller], self._number - self._holding.total()
        return free > (self._spare if mine else 0) and mine < self._share

    def _wait(self, caller: str) -> bool:
        """Wait for a place; tell whether there is one now."""
        if self._waiting.total() >= self._number or self._waiting[caller] >= self._share:
            return False
        self._waiting[caller] += 1
        try:
            return self._condition.wait_for(lambda: self._is_free_for(caller), self._kind.wait_s)
        finally:
            _subtract(self._waiting, caller)

    def _refusal(self, mine: int) -> Exception:
        kind = self._kind
        if not mine:
            return Unreachable(
                "server-busy",
                f"Others have all places for {kind.plural} of this host; try again in a moment.",
            )
        return HttpProblem(
            429, kind.code, f"You have {mine} {kind.plural} here, and get no more now; {kind.advice}.",
            {"Retry-After": str(kind.retry_after_s)},
        )  # fmt: skip


def _subtract(counted: Counter[str], name: str) -> None:
    counted[name] -= 1
    if not counted[name]:
        del counted[name]
