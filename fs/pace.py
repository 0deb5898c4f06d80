"""How fast something goes: the smoothed rate by which the end of a fetch is predicted."""

import math

RATE_MIN_BYTES_S = 1024.0
"""Below it nobody says when the end comes."""
_MEMORY_S = 10.0
"""Half a minute ago counts for a twentieth of now."""
_ELAPSED_MIN_S = 0.001
"""Too short to tell anything."""


class Pace:
    """The rate of one thing that grows; times are of any steady clock, in seconds."""

    def __init__(self, at_s: float, done_bytes: int = 0) -> None:
        self.done_bytes = done_bytes
        """Set it as it grows."""
        self.total_bytes: int | None = None
        """At which it ends, once that is known."""
        self.fresh = True
        """Whether nobody has taken note of it yet."""
        self.rate_bytes_s = 0.0
        self._noted_bytes = done_bytes
        self._noted_at_s = at_s

    @property
    def ended(self) -> bool:
        """Whether all is done."""
        return self.done_bytes == self.total_bytes

    def measure(self, at_s: float) -> float:
        """Return the rate now; standing still counts, so that a stall is not taken for speed."""
        elapsed_s = at_s - self._noted_at_s
        if elapsed_s < _ELAPSED_MIN_S:
            return self.rate_bytes_s
        rate = max(0, self.done_bytes - self._noted_bytes) / elapsed_s
        weight = 1 - math.exp(-elapsed_s / _MEMORY_S) if self.rate_bytes_s else 1.0
        self.rate_bytes_s += weight * (rate - self.rate_bytes_s)
        if self.rate_bytes_s < 1:
            self.rate_bytes_s = 0.0
        self._noted_at_s, self._noted_bytes = at_s, self.done_bytes
        return self.rate_bytes_s


def remaining_s(missing_bytes: int, rate_bytes_s: float) -> float | None:
    """Return how long the rest takes at a rate; None when that is too low to say."""
    if missing_bytes <= 0:
        return 0.0
    if rate_bytes_s < RATE_MIN_BYTES_S:
        return None
    return round(missing_bytes / rate_bytes_s, 1)
