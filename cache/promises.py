"""What an entry promises of its image and of the files at its locations, and what breaks that."""

from collections.abc import Mapping
from dataclasses import dataclass

from stratocache.cache.entry import Entry
from stratocache.cache.errors import NotVerified, Refused
from stratocache.cache.origin import SizeLimit

_ALGORITHMS = ("sha512", "sha256", "sha1", "md5")
_STRONG = frozenset({"sha256", "sha512"})
_COMPRESSED_MARGIN_BYTES = 1024**2


@dataclass(frozen=True)
class FetchedImage:
    """What was fetched, proven and published."""

    identifier: str
    size_bytes: int
    """Of the raw image."""
    sha256: str
    """Of the raw image, in hexadecimal."""


def judge(entry: Entry, image_bytes_max: int) -> None:
    """Refuse what could not be proven, before anything is asked of the network.

    Raises `Refused` (`digest-too-weak`), `NotVerified` (`image-too-large`).
    """
    if not _STRONG & entry.digests.keys():
        raise Refused(
            "digest-too-weak",
            "The entry has neither a SHA-256 nor a SHA-512 digest, so nothing proves its "
            "image; ask the endorser for one that has.",
        )
    if entry.size_bytes > image_bytes_max:
        raise NotVerified(
            "image-too-large",
            f"The entry promises {entry.size_bytes} bytes, over the limit of "
            f"{image_bytes_max}; raise fetch.max_image_bytes if that is intended.",
        )


def algorithms_of(promised: Mapping[str, str]) -> set[str]:
    """Return which digests are to be computed: the promised ones, and SHA-256 in any case."""
    return {"sha256", *(name for name in _ALGORITHMS if name in promised)}


def broken_digest(promised: Mapping[str, str], found: Mapping[str, str]) -> tuple[str, str] | None:
    """Return an algorithm whose digest is not the promised one, and that one; None = all are."""
    for algorithm in _ALGORITHMS:
        expected = promised.get(algorithm, "").lower()
        if expected and found[algorithm] != expected:
            return algorithm, expected
    return None


def source_limit(entry: Entry) -> SizeLimit:
    """Return how long the file at a location of an entry may be."""
    if entry.compression == "none":
        return SizeLimit(entry.size_bytes, exact=True)
    # No compressor makes its input more than a tenth longer.
    return SizeLimit(entry.size_bytes * 11 // 10 + _COMPRESSED_MARGIN_BYTES, exact=False)


def wrong_size(got: str, entry: Entry) -> NotVerified:
    """Return the error for a source of another size than promised."""
    return NotVerified(
        "size-mismatch",
        f"The source has {got} bytes, the entry promises {entry.size_bytes}; the location serves "
        "another file.",
    )


def overlong(entry: Entry) -> NotVerified:
    """Return the error for a source that holds more than promised."""
    if entry.compression == "none":
        return wrong_size(f"more than {entry.size_bytes}", entry)
    return NotVerified(
        "decompression-bomb",
        f"The {entry.compression} source decompresses to more than the {entry.size_bytes} bytes "
        "that the entry promises; it was stopped there.",
    )
