"""Which parts of an image are here, for people to look at."""

from collections.abc import Iterator
from pathlib import Path

from stratocache.cache import seals
from stratocache.cache.errors import NotVerified
from stratocache.fs.offline_plan import is_there
from stratocache.fs.records import COMPLETE, Image

CELLS_MAX = 256


def local_map(state_dir: Path, image: Image, cells: int) -> list[float]:
    """Return, for each of so many equal parts of an image, the share of its chunks that are here.

    Zeros are always here. An image that is complete is not looked at. Looks for a file per chunk.
    """
    if image.state in COMPLETE:
        return [1.0] * cells
    if image.state != "provisional":
        return [0.0] * cells
    try:
        manifest = seals.read_manifest(state_dir, image.id)
    except (FileNotFoundError, NotVerified):
        return [0.0] * cells
    found = []
    for indexes in cell_chunks(manifest.chunk_count, cells):
        here = sum(
            manifest.is_zero(index)
            or is_there(state_dir, manifest.digest(index), manifest.chunk_bytes(index))
            for index in indexes
        )
        found.append(round(here / len(indexes), 3) if indexes else 1.0)
    return found


def cell_chunks(chunk_count: int, cells: int) -> Iterator[range]:
    """Yield the indexes of the chunks of each of so many equal parts of an image."""
    for cell in range(cells):
        first = cell * chunk_count // cells
        last = max(first + 1, (cell + 1) * chunk_count // cells)
        yield range(first, min(last, chunk_count))
