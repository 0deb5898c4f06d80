"""What removing images would free: chunks that nothing else names, counted from manifests alone.

A digest counts for the last of the images, in the order of their going, that names it: only then
does its chunk go. Works through shares of all digests, so that memory stays bounded however much is
cached.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stratocache.cache import seals
from stratocache.cache.chunkindex import chunk_file
from stratocache.cache.chunks import CHUNK_BYTES, DIGEST_BYTES, zero_digest
from stratocache.cache.manifest import Manifest

_DIGESTS_AT_ONCE = 2**18
_SHARES_MAX = 256


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one image takes, in bytes of chunks."""

    stored_bytes: int = 0
    """All that it names, each chunk once."""
    freeable_bytes: int = 0
    """What nothing that stays names."""
    freed_bytes: int = 0
    """What goes with it, those before it in the order being gone."""


def footprints(
    state_dir: Path, staying: Sequence[str], going: Sequence[str],
    partly: Collection[str] = (),
) -> dict[str, Footprint]:  # fmt: skip
    """Return the footprint of each image that may go, in that order, beside manifests that stay.

    Of those that are here `partly` only chunks that are in the store count.
    Manifests that are gone meanwhile count as empty. Raises `NotVerified` (`manifest-invalid`).
    """
    sizes = [_file_bytes(state_dir, name) for name in (*staying, *going)]
    count = sum(sizes) // (DIGEST_BYTES + 8)
    shares = min(_SHARES_MAX, 1 + count // _DIGESTS_AT_ONCE)
    totals = {name: [0, 0, 0] for name in going}
    for share in range(shares):
        kept: set[bytes] = set()
        for name in staying:
            kept.update(digest for digest, _ in _stored(state_dir, name, share, shares))
        later: set[bytes] = set()
        for name in reversed(going):
            chunks = dict(_stored(state_dir, name, share, shares, there=name in partly))
            for digest, size_bytes in chunks.items():
                totals[name][0] += size_bytes
                if digest not in kept:
                    totals[name][1] += size_bytes
                    if digest not in later:
                        totals[name][2] += size_bytes
            later.update(chunks)
    return {name: Footprint(*counted) for name, counted in totals.items()}


def _stored(
    state_dir: Path, name: str, share: int, shares: int, *, there: bool = False
) -> Iterator[tuple[bytes, int]]:
    """Yield the chunks of a manifest with their sizes; half of a digest names it well enough."""
    manifest: Manifest | None = None
    with suppress(FileNotFoundError):
        manifest = seals.read_manifest(state_dir, name)
    if manifest is None:
        return
    zero, digests, last = zero_digest(CHUNK_BYTES), manifest.digests, manifest.chunk_count - 1
    for index in range(manifest.chunk_count):
        start = index * DIGEST_BYTES
        if digests[start] % shares == share:
            digest = digests[start : start + DIGEST_BYTES]
            if there and not chunk_file(state_dir / "chunks", digest).exists():
                continue
            if digest != zero and not (index == last and manifest.is_zero(last)):
                yield digest[: DIGEST_BYTES // 2], manifest.chunk_bytes(index)


def _file_bytes(state_dir: Path, name: str) -> int:
    with suppress(FileNotFoundError):
        return seals.manifest_path(state_dir, name).stat().st_size
    return 0
