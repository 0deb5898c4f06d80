"""What a reference resolves to: one immutable record that images and disks keep."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Compression = Literal["none", "gz", "bz2", "xz", "zst"]
ImageFormat = Literal["raw", "qcow2"]
Trust = Literal["signed", "legacy-sha1", "unsigned"]

STRONG_DIGESTS = ("sha256", "sha512")
"""Algorithms whose digests nobody can make an image for."""

LOCAL_CATALOGUE = "local"
"""What stands for the catalogue in entries of images that were made on this host."""


class Endorser(BaseModel):
    """Who signed an entry: the identity in the document, proven by the certificate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    email: str
    subject: str
    issuer: str
    fingerprint_sha256: str = ""
    """Lower-case hexadecimal SHA-256 of the signing certificate; empty when unsigned."""


class EndorsedIndex(BaseModel):
    """Where the chunk index of an image is, and its digest as the endorser signed it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    sha256: str
    """Of the `.caibx` file, lower-case hexadecimal."""


class Entry(BaseModel):
    """One endorsement of one image, as its catalogue gave it and after its signature was judged.

    `size_bytes` and `digests` describe the decompressed file that a location serves. For the raw
    format these are the image's own; for qcow2 they are those of the container, whose virtual disk
    becomes the image. `digests` maps `sha1`, `sha256`, `sha512` or `md5` to lower-case hexadecimal.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    catalogue: str
    identifier: str
    size_bytes: int = Field(ge=0)
    digests: dict[str, str]
    locations: tuple[str, ...]
    compression: Compression = "none"
    format: ImageFormat = "raw"
    index: EndorsedIndex | None = None
    """Lets every chunk be verified by itself, before the whole image is here."""
    endorser: Endorser
    endorsed_at: datetime
    trust: Trust
    valid_until: datetime | None = None
    deprecated: str | None = None
    """The reason that the endorser gave; an empty text is deprecated too."""
    kind: str | None = None
    title: str | None = None
    description: str | None = None
    os: str | None = None
    os_version: str | None = None
    os_arch: str | None = None
    version: str | None = None
    tag: str | None = None
    source: str = ""
    """The URL or path that the document was read from."""


def same_content(entry: Entry, other: Entry) -> bool:
    """Tell whether two entries promise the same image, by a digest that nobody can forge."""
    strong = [
        (entry.digests[name], other.digests[name])
        for name in STRONG_DIGESTS
        if name in entry.digests and name in other.digests
    ]
    agree = bool(strong) and all(mine == theirs for mine, theirs in strong)
    return agree and (entry.size_bytes, entry.format) == (other.size_bytes, other.format)
