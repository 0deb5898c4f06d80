"""Uploads: bytes that become a disk's, part by part, and the disk's only when all are there.

transfers/upload-UUID/content       what has arrived; zeros are holes
transfers/upload-UUID/image         the raw disk converted from it, when it is qcow2
transfers/upload-UUID/upload.json   how far it is; never further than `content` is durable

An upload grows at its end only: the *offset* is the number of bytes that are there. A part says
which offset it continues; it may begin behind it, then there are zeros between. The offset 0 always
begins a new upload. What comes after the offset in `content` is of a part that did not end, and is
cut off before the next. The last part renames the file over the disk's, in one step: until then,
and after any failure, the disk has its old content.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import trio

from stratocache.cache import conversion
from stratocache.cache.configuration import Configuration
from stratocache.cache.errors import (
    Conflict,
    InvalidInput,
    NotFound,
    NotVerified,
)
from stratocache.cache.space import Space, full_disk_is_no_space
from stratocache.fs import inventory, rights, transfers
from stratocache.fs.content_hold import disk_directory, hold_for_writing
from stratocache.fs.content_source import FileSource
from stratocache.fs.records import Caller, Disk
from stratocache.fs.sparse_file import write_sparse
from stratocache.fs.state import Database, record_event
from stratocache.fs.storage import FILES

log = logging.getLogger(__name__)

ContentFormat = Literal["raw", "qcow2"]
Digests = Mapping[str, str]
"""Expected digests in hexadecimal by the names that `hashlib` gives them."""

_PIECE_BYTES = 1024**2
_CHECKPOINT_BYTES = 64 * 1024**2
_CHECKPOINT_S = 5.0
"""What arrived longer ago survives the death of this process, however slow the line is."""
_RECORD_BYTES_MAX = 64 * 1024
_CONTAINER_MARGIN_BYTES = 64 * 1024**2


class Body(Protocol):
    """What a part's bytes are read from."""

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes; none only at the end, `OSError` when the sender is gone."""


@dataclass(frozen=True)
class Part:
    """What a sender says of the bytes that it sends."""

    format: ContentFormat
    offset_bytes: int
    """How much was there before; 0 begins anew."""
    start_bytes: int
    """Where these begin."""
    length_bytes: int | None
    """How many these are; None = up to the end of the body, which is the end of the content."""
    total_bytes: int | None
    """How many there will be; None only when `length_bytes` is."""
    source: str = ""
    """Whatever tells one content from another; parts of one upload have the same."""
    part_digests: Digests | None = None
    """Of these bytes."""
    content_digests: Digests | None = None
    """Of the whole content."""


@dataclass(frozen=True)
class Upload:
    """How far an upload is."""

    format: ContentFormat
    total_bytes: int | None
    offset_bytes: int
    source: str
    complete: bool = False
    """Whether it has become the disk's content."""


class Uploads:
    """The uploads of one host. Methods block; any number of processes may use the same files."""

    def __init__(self, configuration: Configuration, db: Database) -> None:
        self._configuration = configuration
        self._db = db
        self._space = Space(configuration.state_dir, configuration.space.reserve_bytes)

    def find(self, caller: Caller, uuid: str) -> Upload:
        """Return how far the last upload for a disk is; raises `NotFound` (`upload-unknown`)."""
        self._writable_disk(caller, uuid)
        upload = _load(self._directory(uuid))
        if upload is None:
            raise NotFound("upload-unknown", f"Nothing has been uploaded for disk {uuid}.")
        return upload

    def abandon(self, caller: Caller, uuid: str) -> None:
        """Remove what has been uploaded; nothing there is fine. Raises `Conflict`
        (`upload-busy`)."""
        self._writable_disk(caller, uuid)
        directory = self._directory(uuid)
        with transfers.claimed(directory) as ours:
            if not ours and directory.exists():
                raise _busy(uuid)
            shutil.rmtree(directory, ignore_errors=True)

    def receive(self, caller: Caller, uuid: str, part: Part, body: Body) -> Upload:
        """Take one part, and with the last make the content the disk's.

        Raises `Conflict`: `upload-busy`, `upload-mismatch` (another offset, total, format or source
        than there is), `disk-attached`, `disk-busy`, `disk-is-overlay`; `InvalidInput`:
        `content-too-large`, `body-truncated` (what arrived is kept); `NotVerified`:
        `digest-mismatch` and, for qcow2, what `cache.conversion` raises (nothing is kept);
        `NoSpace`.
        """
        disk = self._writable_disk(caller, uuid)
        self._require_ready(disk)
        _judge_size(disk, part)
        if part.offset_bytes == 0:
            transfers.sweep(self._configuration, self._db)
        directory = self._directory(uuid)
        directory.mkdir(mode=0o700, exist_ok=True)
        with transfers.claimed(directory) as ours:
            if not ours:
                raise _busy(uuid)
            upload = _begin(directory, uuid, part)
            with full_disk_is_no_space(directory):
                upload = self._append(directory, disk, upload, part, body)
            if upload.offset_bytes == upload.total_bytes:
                upload = self._finish(directory, disk, upload, part.content_digests or {})
        return upload

    def _directory(self, uuid: str) -> Path:
        return transfers.transfers_directory(self._configuration) / f"{transfers.UPLOAD}{uuid}"

    def _writable_disk(self, caller: Caller, uuid: str) -> Disk:
        disk = inventory.disk(self._db, caller, uuid)
        rights.require_write(self._db, caller, disk)
        return disk

    def _require_ready(self, disk: Disk) -> None:
        with self._db.transaction():
            hold_for_writing(self._db, disk).release()
        if disk.form != "raw":
            raise Conflict(
                "disk-is-overlay",
                f"Disk {disk.uuid} is an overlay; hydrate it first, or upload to a blank disk.",
            )

    def _append(
        self, directory: Path, disk: Disk, upload: Upload, part: Part, body: Body
    ) -> Upload:
        """Write a part behind what is there and record it; `body-truncated` records what came."""
        hashers = {name: hashlib.new(name) for name in part.part_digests or ()}
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(directory / "content", flags, 0o600)
        try:
            os.ftruncate(descriptor, upload.offset_bytes)
            os.ftruncate(descriptor, part.start_bytes)
            position = durable = part.start_bytes
            saved_s = time.monotonic()
            for data in _pieces(part, body):
                _judge_size(
                    disk, replace(part, total_bytes=part.total_bytes or position + len(data))
                )
                self._space.require(len(data))
                write_sparse(descriptor, data, position)
                position += len(data)
                os.ftruncate(descriptor, position)
                for hasher in hashers.values():
                    hasher.update(data)
                late = time.monotonic() - saved_s >= _CHECKPOINT_S
                if not hashers and (late or position - durable >= _CHECKPOINT_BYTES):
                    upload = _save(directory, descriptor, replace(upload, offset_bytes=position))
                    durable, saved_s = position, time.monotonic()
            _compare(part.part_digests or {}, {n: h.hexdigest() for n, h in hashers.items()})
            total_bytes = position if part.total_bytes is None else part.total_bytes
            upload = replace(upload, offset_bytes=position, total_bytes=total_bytes)
            return _save(directory, descriptor, upload)
        except _Gone as gone:
            if not hashers:
                _save(directory, descriptor, replace(upload, offset_bytes=position))
            raise InvalidInput(
                "body-truncated", f"The body ended early ({gone}); continue with what is there."
            ) from None
        finally:
            os.close(descriptor)

    def _finish(self, directory: Path, disk: Disk, upload: Upload, expected: Digests) -> Upload:
        content = directory / "content"
        try:
            _compare_file(content, expected)
            image = content if upload.format == "raw" else self._convert(directory, disk)
        except (NotVerified, InvalidInput):
            shutil.rmtree(directory, ignore_errors=True)
            raise
        os.truncate(image, disk.size_bytes)
        with image.open("rb") as file:
            os.fsync(file.fileno())
        self._commit(image, disk)
        done = replace(upload, complete=True)
        _write_record(directory, done)
        content.unlink(missing_ok=True)
        return done

    def _convert(self, directory: Path, disk: Disk) -> Path:
        container, image = directory / "content", directory / "image"

        async def convert() -> None:
            limit_bytes = self._configuration.fetch.max_image_bytes
            size_bytes = await conversion.inspect(container, image_bytes_max=limit_bytes)
            if size_bytes > disk.size_bytes:
                raise _too_large(disk, size_bytes)
            await conversion.convert(container, image, size_bytes=size_bytes, space=self._space)

        image.unlink(missing_ok=True)
        try:
            trio.run(convert)
        except BaseException:
            image.unlink(missing_ok=True)
            raise
        return image

    def _commit(self, image: Path, disk: Disk) -> None:
        """Make a durable file the disk's; whoever else wants the disk comes before or after."""
        directory = disk_directory(self._db, disk.uuid)
        with self._db.transaction() as connection:
            present = inventory.find_disk(self._db, disk.uuid)
            if present is None or present.form != "raw" or present.size_bytes != disk.size_bytes:
                raise Conflict("disk-busy", f"Disk {disk.uuid} changed meanwhile; try again.")
            with hold_for_writing(self._db, present):
                connection.execute(
                    "UPDATE disks SET generation = generation + 1 WHERE uuid = ?", (disk.uuid,)
                )
                image.rename(directory / "data")
                FILES.sync_directory(directory)
                record_event(
                    connection, "disk.uploaded", disk.uuid, f"Disk {disk.uuid} has new content."
                )


def _begin(directory: Path, uuid: str, part: Part) -> Upload:
    if part.offset_bytes == 0:
        for name in ("upload.json", "image", "content"):
            (directory / name).unlink(missing_ok=True)
        fresh = Upload(part.format, part.total_bytes, 0, part.source)
        _write_record(directory, fresh)
        return fresh
    upload = _load(directory)
    there = 0 if upload is None or upload.complete else upload.offset_bytes
    if upload is None or there != part.offset_bytes:
        raise Conflict(
            "upload-mismatch",
            f"{there} bytes have been uploaded for disk {uuid}, not {part.offset_bytes}; "
            "continue there.",
        )
    wanted = (part.format, part.source, part.total_bytes)
    if wanted != (upload.format, upload.source, upload.total_bytes or part.total_bytes):
        raise Conflict(
            "upload-mismatch",
            f"The upload for disk {uuid} has another format, size or source; begin at 0.",
        )
    return upload


def _judge_size(disk: Disk, part: Part) -> None:
    limit_bytes = disk.size_bytes
    if part.format == "qcow2":
        limit_bytes += limit_bytes // 10 + _CONTAINER_MARGIN_BYTES
    if (part.total_bytes or 0) > limit_bytes:
        raise _too_large(disk, part.total_bytes or 0)


def _too_large(disk: Disk, size_bytes: int) -> InvalidInput:
    return InvalidInput(
        "content-too-large",
        f"Content of {size_bytes} bytes does not fit disk {disk.uuid} of {disk.size_bytes} bytes.",
    )


def _busy(uuid: str) -> Conflict:
    return Conflict("upload-busy", f"Another upload for disk {uuid} is under way; try again.")


class _Gone(Exception):
    """The sender is gone before the end of its part."""


def _pieces(part: Part, body: Body) -> Iterator[bytes]:
    """Yield a part's bytes; raises `_Gone`."""
    missing_bytes = part.length_bytes
    while missing_bytes != 0:
        try:
            data = body.read(min(_PIECE_BYTES, missing_bytes or _PIECE_BYTES))
        except OSError as error:
            raise _Gone(str(error) or type(error).__name__) from None
        if not data:
            if missing_bytes is None:
                return
            raise _Gone(f"{missing_bytes} bytes are missing")
        if missing_bytes is not None:
            missing_bytes -= len(data)
        yield data


def _compare(expected: Digests, found: Digests) -> None:
    for name, digest in expected.items():
        if found[name] != digest:
            raise NotVerified(
                "digest-mismatch",
                f"The {name} of what arrived is {found[name]}, not {digest}; send it again.",
            )


def _compare_file(content: Path, expected: Digests) -> None:
    if expected:
        source = FileSource(content, content.stat().st_size)
        try:
            hashers = {name: hashlib.new(name) for name in expected}
            for piece in source.pieces(0, source.size_bytes):
                for hasher in hashers.values():
                    hasher.update(piece)
        finally:
            source.close()
        _compare(expected, {name: hasher.hexdigest() for name, hasher in hashers.items()})


def _save(directory: Path, descriptor: int, upload: Upload) -> Upload:
    os.fdatasync(descriptor)
    _write_record(directory, upload)
    return upload


def _write_record(directory: Path, upload: Upload) -> None:
    temporary = directory / "upload.json.new"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(asdict(upload), file)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(directory / "upload.json")


def _load(directory: Path) -> Upload | None:
    """Return what is recorded of an upload; None when there is none or its content is gone."""
    with suppress(OSError, ValueError, TypeError):
        with (directory / "upload.json").open(encoding="utf-8") as file:
            upload = Upload(**json.loads(file.read(_RECORD_BYTES_MAX)))
        if upload.complete or (directory / "content").stat().st_size >= upload.offset_bytes:
            return upload
    return None
