"""What would fail without its origins: images that are pinned, attached or bases of disks, and are
not whole here."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stratocache.cache import seals
from stratocache.cache.chunkindex import chunk_file
from stratocache.cache.configuration import Configuration
from stratocache.cache.errors import NotVerified
from stratocache.cache.manifest import Manifest
from stratocache.fs.losses import losses
from stratocache.fs.records import COMPLETE, READABLE
from stratocache.fs.space_plan import ImageHolding, holdings
from stratocache.fs.state import Database


@dataclass(frozen=True, slots=True)
class Weakness:
    """One image that is needed here and cannot be read whole without its origins."""

    holding: ImageHolding
    reason: str
    missing_chunks: int
    missing_bytes: int


def weaknesses(configuration: Configuration, db: Database) -> Iterator[Weakness]:
    """Yield every image that something holds and that would fail without its origins.

    Looks for each chunk's file and its length; what only hashing finds is the scrubber's to find,
    and counts when it has been found.
    """
    lost = {name for loss in losses(db) for name in loss.images}
    for holding in holdings(db):
        if not holding.held:
            continue
        image = holding.image
        if image.state not in READABLE:
            yield Weakness(holding, f"it is {image.state}", 0, image.entry.size_bytes)
            continue
        complete = image.state in COMPLETE
        reason = "chunks are missing" if complete else "it is not complete yet"
        try:
            manifest = seals.read_manifest(configuration.state_dir, image.id)
        except (FileNotFoundError, NotVerified):
            gone = "its manifest is damaged or gone" if complete else reason
            yield Weakness(holding, gone, 0, image.size_bytes or 0)
            continue
        missing = list(_missing(configuration.state_dir, manifest))
        if missing:
            missing_bytes = sum(map(manifest.chunk_bytes, missing))
            yield Weakness(holding, reason, len(missing), missing_bytes)
        elif image.id in lost:
            yield Weakness(holding, "chunks are damaged and no origin had them", 0, 0)


def _missing(state_dir: Path, manifest: Manifest) -> Iterator[int]:
    seen: dict[bytes, bool] = {}
    for index in range(manifest.chunk_count):
        if manifest.is_zero(index):
            continue
        digest = manifest.digest(index)
        if digest not in seen:
            seen[digest] = is_there(state_dir, digest, manifest.chunk_bytes(index))
            if not seen[digest]:
                yield index


def is_there(state_dir: Path, digest: bytes, size_bytes: int) -> bool:
    """Tell whether a chunk has a file of the right length."""
    try:
        return chunk_file(state_dir / "chunks", digest).lstat().st_size == size_bytes
    except FileNotFoundError:
        return False
