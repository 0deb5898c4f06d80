"""Stage directories: what a fetch has on disk before its image is published.

stage/IDENTIFIER/source.json    which location the next file is of, and how to continue it
stage/IDENTIFIER/source.part    bytes of the source as served
stage/IDENTIFIER/container      a decompressed qcow2 file
stage/IDENTIFIER/image          the raw image converted from it
stage/IDENTIFIER/digests        what has flowed past of an image without an index (growing)
"""

import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

_RECORD_BYTES_MAX = 64 * 1024


@dataclass(frozen=True)
class Source:
    """What `source.part` is: enough to ask its server for the rest of the same bytes."""

    location: str
    validator: str | None
    """A strong ETag, or Last-Modified, as If-Range wants it (RFC 9110 section 13.1.5)."""
    length_bytes: int | None
    """Of the whole source; None when the server did not say."""
    complete: bool = False


class Stage:
    """One image's stage directory. Methods block."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.source = directory / "source.part"
        self.container = directory / "container"
        self.image = directory / "image"
        self.digests = directory / "digests"
        self._record = directory / "source.json"

    def create(self) -> None:
        """Make the directory if it is not there."""
        self.directory.mkdir(mode=0o750, parents=True, exist_ok=True)

    def remove(self) -> None:
        """Remove the directory and all in it; nothing there is fine."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def drop(self) -> None:
        """Remove what has been downloaded, and the directory when nothing else is in it."""
        for path in (self.source, self._record):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.directory.rmdir()

    def restart(self, source: Source) -> None:
        """Begin a download from its first byte: record what it is, empty the file."""
        with self.source.open("wb"):
            self.save(source)

    def save(self, source: Source) -> None:
        """Record what `source.part` is. Not synced: after power loss the digests decide."""
        temporary = self._record.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(source)), encoding="utf-8")
        os.replace(temporary, self._record)

    def load(self) -> Source | None:
        """Return what `source.part` is; None when there is none or its record is no use."""
        try:
            with self._record.open(encoding="utf-8") as file:
                tree = json.loads(file.read(_RECORD_BYTES_MAX))
            return Source(**tree) if self.source.exists() else None
        except (OSError, ValueError, TypeError):
            return None

    def downloaded_bytes(self) -> int:
        """Return the size of `source.part`, 0 when there is none."""
        try:
            return self.source.stat().st_size
        except FileNotFoundError:
            return 0
