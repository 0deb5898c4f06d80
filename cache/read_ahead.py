"""Read-ahead of chunks: recognises readers that go through an image in order.

A boot loader reads a kernel and an initial RAM disk from end to end; while it waits for one chunk
the link could bring the next ones. A chunk that follows one that was waited for makes a stream, and
each further one doubles how far ahead of it chunks are fetched. Scattered reads make no stream, so
they fetch nothing that nobody asked for.
"""

from dataclasses import dataclass

from stratocache.cache.chunks import CHUNK_BYTES

AHEAD_MAX = 4 * 1024**2 // CHUNK_BYTES
"""Chunks ahead of a reader, and so what a stream that ends may have fetched in vain."""
_STREAMS_MAX = 16
"""Remembered per image; the one that was not read for longest is forgotten."""


@dataclass(frozen=True)
class _Stream:
    """A reader who was seen at one place, and is expected at the next."""

    place: int
    """The chunk that was waited for last."""
    end: int
    """Behind the last chunk that is here, or on its way."""
    ahead: int
    """How many chunks beyond `place` were wanted; 0 for a place that nobody has gone on from."""


class ReadAhead:
    """The streams of one image of `count` chunks. Belongs to one trio loop."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._streams: list[_Stream] = []
        """In the order of their last reads."""

    def wanted(self, place: int) -> range:
        """Take note that a reader waits for a chunk; return those that it will want soon."""
        stream = next((one for one in self._streams if one.place <= place <= one.end), None)
        if stream is None:
            self._remember(_Stream(place, place + 1, 0))
            return range(0)
        self._streams.remove(stream)
        if stream.place == place:  # another reader at the same place says nothing new
            self._remember(stream)
            return range(0)
        ahead = min(max(1, 2 * stream.ahead), AHEAD_MAX)
        start = max(stream.end, place + 1)
        end = max(start, min(place + 1 + ahead, self._count))
        self._remember(_Stream(place, end, ahead))
        return range(start, end)

    def _remember(self, stream: _Stream) -> None:
        self._streams.append(stream)
        del self._streams[:-_STREAMS_MAX]
