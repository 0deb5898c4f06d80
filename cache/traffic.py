"""What fetching cost and what the cache saved: bytes, readers' waits, hits and misses."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

READER: ContextVar[str] = ContextVar("READER", default="")
"""On whose behalf the running task reads; its waits are counted under this name."""


@dataclass
class ImageTraffic:
    """One image, since the process started."""

    remote_bytes: int = 0
    """Moved over the network, or read from a location, as served."""
    peer_bytes: int = 0
    """Of them, that came from peers."""
    arrived_bytes: int = 0
    """Of the image, that these gave."""
    wait_s: float = 0.0
    """That readers waited, all of them together."""


@dataclass
class ReadCounts:
    """How those who read one manifest fared, since the process started.

    A read is of one chunk; one that spans two counts for each. Chunks of zeros count for nothing:
    no cache is needed for them.
    """

    hits: int = 0
    """Of chunks that were here."""
    hit_bytes: int = 0
    """That these gave."""
    misses: int = 0
    """Of chunks that had to be fetched while the reader waited."""
    miss_bytes: int = 0


@dataclass
class ReaderTraffic:
    """One reader, a disk or an image that is attached."""

    wait_s: float = 0.0
    remote_bytes: int = 0
    """Of images, fetched because it asked first."""


class Traffic:
    """Counters that only grow; belongs to one trio loop."""

    def __init__(self) -> None:
        self.images: dict[str, ImageTraffic] = defaultdict(ImageTraffic)
        self.readers: dict[str, ReaderTraffic] = defaultdict(ReaderTraffic)
        self.chunks: Counter[str] = Counter()
        """Chunks that landed singly: `demand`, somebody waited for them, or `background`."""
        self.requests: Counter[str] = Counter()
        """Requests for single chunks by how they ended: `ok`, or the kind of `Unavailable`."""

    def arrived(self, image_id: str, size_bytes: int, *, demand: bool) -> None:
        """Count a chunk that landed."""
        self.images[image_id].arrived_bytes += size_bytes
        self.chunks["demand" if demand else "background"] += 1

    def cost(self) -> tuple[float, float]:
        """Return the bytes moved and the seconds waited, all together."""
        items = self.images.values()
        return sum(item.remote_bytes for item in items), sum(item.wait_s for item in items)

    def requested(self, outcome: str) -> None:
        """Count a request for single chunks that has ended."""
        self.requests[outcome] += 1

    def moved(self, image_id: str, size_bytes: int, *, by_peer: bool = False) -> None:
        """Count what an origin or a peer sent."""
        self.images[image_id].remote_bytes += size_bytes
        if by_peer:
            self.images[image_id].peer_bytes += size_bytes

    def asked(self, reader: str, size_bytes: int) -> None:
        """Count a chunk that came because a reader asked for it."""
        if reader:
            self.readers[reader].remote_bytes += size_bytes

    def waited(self, image_id: str, reader: str, wait_s: float) -> None:
        """Count the time that a reader waited for a chunk."""
        self.images[image_id].wait_s += wait_s
        if reader:
            self.readers[reader].wait_s += wait_s


@contextmanager
def reading_for(reader: str) -> Iterator[None]:
    """Count what the running task waits for in this block under the name of a reader."""
    token = READER.set(reader)
    try:
        yield
    finally:
        READER.reset(token)
