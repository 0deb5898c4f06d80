"""What a Marketplace entry says, as values; `constraints` reads it from a document."""

from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType

from stratocache.cache.entry import EndorsedIndex

BASE = "http://mp.stratuslab.eu/"
DATE_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
ALGORITHMS = MappingProxyType(
    {
        "MD5": ("md5", 32),
        "SHA-1": ("sha1", 40),
        "SHA-256": ("sha256", 64),
        "SHA-512": ("sha512", 128),
    }
)
"""Names in documents, our names, and the digests' hexadecimal digits."""


@dataclass(frozen=True)
class Endorsement:
    """Who says when that the image is what the entry describes."""

    created: datetime
    email: str
    subject: str
    issuers: tuple[str, ...]


@dataclass(frozen=True)
class Metadata:
    """What a document says, once it says it correctly; nothing here is verified yet."""

    identifier: str
    size_bytes: int
    digests: dict[str, str]
    endorsement: Endorsement | None
    """None in a document that waits for its signature."""
    locations: tuple[str, ...]
    valid_until: datetime | None
    index: EndorsedIndex | None = None
    terms: dict[str, str] = field(default_factory=dict)
    """Text of the elements that occur at most once, by prefixed name."""
    notes: tuple[str, ...] = ()

    @property
    def deprecated(self) -> str | None:
        """The reason for the deprecation, which may be empty; None for an entry in use."""
        return self.terms.get("slterms:deprecated")
