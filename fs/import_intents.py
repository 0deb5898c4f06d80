"""Asking for a disk that is made of a file of an HTTP(S) server."""

import re
import uuid as uuid_module
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from stratocache.cache.entry import Compression
from stratocache.cache.errors import InvalidInput
from stratocache.fs import quotas
from stratocache.fs.content_upload import ContentFormat
from stratocache.fs.operation_intents import add_operation
from stratocache.fs.quotas import Amounts
from stratocache.fs.records import Caller, DiskRequest, Operation
from stratocache.fs.state import Database

IMPORT_DISK = "import-disk"
"""The kind of the operations; `stratocache.fs.importing` performs them."""

_URL_CHARACTERS_MAX = 4096
_SUFFIXES: dict[str, Compression] = {".gz": "gz", ".bz2": "bz2", ".xz": "xz", ".zst": "zst"}
_DIGEST_DIGITS = {"sha256": 64, "sha512": 128}


@dataclass(frozen=True)
class ImportRequest:
    """A file that is to become a disk."""

    url: str
    format: ContentFormat | None = None
    """None = qcow2 when the name ends so (before the suffix of a compression), else raw."""
    compression: Compression | None = None
    """None = as the name's suffix says."""
    size_bytes: int | None = None
    """Of the disk, when that is to be larger than the content."""
    sha256: str | None = None
    """Of the file as served, in hexadecimal, like those that distributors publish."""
    sha512: str | None = None

    def check(self) -> None:
        """Raise `InvalidInput` (`url-invalid`, `digest-invalid`) for what can never be fetched."""
        parts = urlsplit(self.url)
        if parts.username is not None or parts.password is not None:
            raise InvalidInput(
                "url-invalid", "Leave name and password out: operations show the address.",
                field="import_url",
            )  # fmt: skip
        plain = len(self.url) <= _URL_CHARACTERS_MAX and not re.search(r"[\s\x00-\x1f]", self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
            raise InvalidInput(
                "url-invalid", "Give an address that begins with http:// or https://.",
                field="import_url",
            )  # fmt: skip
        for name, digest in self.digests().items():
            if not re.fullmatch(rf"[0-9a-fA-F]{{{_DIGEST_DIGITS[name]}}}", digest):
                raise InvalidInput(
                    "digest-invalid",
                    f"A {name} digest has {_DIGEST_DIGITS[name]} hexadecimal digits.",
                    field=name,
                )

    def digests(self) -> dict[str, str]:
        """Return the digests that are expected, by name."""
        given = {"sha256": self.sha256, "sha512": self.sha512}
        return {name: digest for name, digest in given.items() if digest is not None}

    def chosen_compression(self) -> Compression:
        """Return the compression that was given, or that the name tells."""
        return self.compression or _SUFFIXES.get(Path(urlsplit(self.url).path).suffix, "none")

    def chosen_format(self) -> ContentFormat:
        """Return the format that was given, or that the name tells; content is never probed."""
        if self.format is not None:
            return self.format
        name = Path(urlsplit(self.url).path)
        if name.suffix in _SUFFIXES:
            name = name.with_suffix("")
        return "qcow2" if name.suffix == ".qcow2" else "raw"


def import_disk(
    db: Database, caller: Caller, disk: DiskRequest, wanted: ImportRequest
) -> Operation:
    """Ask for a disk with the content of a file; the operation's subject is the disk's UUID.

    Raises `InvalidInput` (`origin-ambiguous`, and as `ImportRequest.check`).
    """
    if disk.reference is not None or disk.snapshot is not None:
        raise InvalidInput(
            "origin-ambiguous", "Give an address, a reference or a snapshot; only one of them.",
            field="import_url",
        )  # fmt: skip
    wanted.check()
    uuid = str(uuid_module.uuid4())
    request = {"disk": asdict(disk), "import": asdict(wanted)}
    with db.transaction() as connection:
        held = Amounts(bytes=wanted.size_bytes or 0, disks=1)
        quotas.require(connection, caller.name, held)
        return add_operation(connection, caller, IMPORT_DISK, uuid, request)
