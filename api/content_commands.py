"""`stratocache disk download` and `upload`: all bytes of a disk, to a file and from one."""

import hashlib
import os
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import quote

import click

from stratocache.api.completion import DISK, SNAPSHOT
from stratocache.api.examples import examples
from stratocache.api.resource_path import path_of
from stratocache.api.session import Command, Session, json_option

if TYPE_CHECKING:
    from http.client import HTTPResponse

    from stratocache.api.client import Client, Document, Report
    from stratocache.cache.errors import StratocacheError

_PIECE_BYTES = 1024**2
_PART_BYTES = 8 * 1024**2
_RECONNECT_S = 20.0
"""How long the API may be away, as when it is restarted, before a transfer is given up."""
_PLACE_S = 600.0
"""How long a transfer waits for its turn when the daemon has no place for it."""
_NO_PLACE = ("transfers-rationed", "server-busy", "rate-limited")
_PAUSE_S = 0.2
_TURN_PAUSE_S = 2.0
_MEDIA_TYPES = {"raw": "application/octet-stream", "qcow2": "application/x-qcow2"}

_FORMAT = click.option(
    "--format", "format_", type=click.Choice(list(_MEDIA_TYPES)),
    help="Of the file; without it, qcow2 when its name ends in .qcow2.",
)  # fmt: skip


@click.command(
    epilog=examples(
        "stratocache disk download $UUID backup.qcow2",
        "stratocache disk download $UUID - --snapshot $SNAPSHOT | zstd > backup.img.zst",
    )
)
@click.argument("uuid", type=DISK)
@click.argument("file")
@_FORMAT
@click.option("--snapshot", type=SNAPSHOT, metavar="ID", help="Of the disk; it may be in use then.")
@json_option
@click.pass_obj
def download(
    session: Session, uuid: str, file: str, format_: str | None, snapshot: str | None
) -> None:
    """Write all bytes of a disk to FILE, or to standard output when FILE is `-`.

    The disk may not be attached read-write. FILE is sparse and appears when it is complete; a
    download that was interrupted goes on in FILE.part when it is started again.
    """
    from stratocache.api import progress

    format_ = format_ or _format_of(file)
    chosen = f"?snapshot={quote(snapshot, safe='')}" if snapshot is not None else ""
    wanted = _Wanted(
        session.client, path_of("disks", uuid, "content") + chosen, _MEDIA_TYPES[format_]
    )
    with progress.shown("download", quiet=session.as_json) as report:
        if file == "-":
            _copy(wanted, sys.stdout.buffer, report)
            return
        size_bytes = _Download(wanted, Path(file)).run(report)
    session.show(
        {"disk": uuid, "file": file, "format": format_, "size_bytes": size_bytes},
        f"Disk {uuid} is in {file}.",
    )


@click.command(
    epilog=examples(
        "stratocache disk upload $UUID disk.img",
    )
)
@click.argument("uuid", type=DISK)
@click.argument("file", type=click.Path(path_type=Path))
@_FORMAT
@json_option
@click.pass_obj
def upload(session: Session, uuid: str, file: Path, format_: str | None) -> None:
    """Make the bytes of FILE those of a blank or raw disk that is not attached.

    The rest of a disk that is larger is zeros. The disk has its old content until all is there; an
    upload that was interrupted goes on when it is started again.
    """
    from stratocache.api import progress

    format_ = format_ or _format_of(file.name)
    with _open_regular(file) as source, progress.shown("upload", quiet=session.as_json) as report:
        size_bytes = _Upload(
            session.client, path_of("disks", uuid, "content"), source, format_
        ).run(report)
    session.show(
        {"disk": uuid, "file": str(file), "format": format_, "size_bytes": size_bytes},
        f"Disk {uuid} has the content of {file}.",
    )


def import_options(command: Command) -> Command:
    """Add what `disk create` takes to import a file; the names are those of the API's fields."""
    for option in reversed(_IMPORT_OPTIONS):
        command = option(command)
    return command


_IMPORT_OPTIONS = (
    click.option("--import", "import_url", metavar="URL", help="Download its content from there."),
    click.option(
        "--format", type=click.Choice(list(_MEDIA_TYPES)),
        help="Of the file to import; without it, as its name ends.",
    ),
    click.option(
        "--compression", type=click.Choice(["none", "gz", "bz2", "xz", "zst"]),
        help="Of the file to import; without it, as its name ends.",
    ),
    click.option("--sha256", help="Of the file to import, as it is served."),
    click.option("--sha512", help="Of the file to import, as it is served."),
)  # fmt: skip


class _Wanted:
    """A disk's content in one format."""

    def __init__(self, client: "Client", address: str, media_type: str) -> None:
        self._client = client
        self._address = address
        self._media_type = media_type

    @contextmanager
    def open(self, offset: int = 0, etag: str = "") -> Iterator["HTTPResponse"]:
        """Ask for all, or for what comes from an offset when the content is still the same."""
        headers = {"Accept": self._media_type}
        if offset and etag:
            headers |= {"Range": f"bytes={offset}-", "If-Range": etag}
        with self._client.exchange("GET", self._address, headers) as response:
            yield response


class _Download:
    """A file that is being downloaded: FILE.part and, beside it, what it is a part of."""

    def __init__(self, wanted: _Wanted, file: Path) -> None:
        from stratocache.cache.errors import Conflict

        if file.exists():
            raise Conflict("file-exists", f"{file} exists; remove it, or name another.")
        self._wanted = wanted
        self._file = file
        self._part = file.with_name(file.name + ".part")
        self._tag = file.with_name(file.name + ".part.etag")

    def run(self, report: "Report") -> int:
        """Complete the file; return its size."""
        patience = _Patience()
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self._part, flags, 0o600)
        try:
            while (size_bytes := self._attempt(descriptor, report, patience)) is None:
                patience.wait()
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._part.rename(self._file)
        self._tag.unlink(missing_ok=True)
        _sync_directory(self._file.parent)
        return size_bytes

    def _attempt(self, descriptor: int, report: "Report", patience: "_Patience") -> int | None:
        """Download what is missing; return the size when all is there."""
        from stratocache.cache.errors import InvalidInput, Unreachable

        offset = os.fstat(descriptor).st_size
        etag = self._tag.read_text(errors="ignore") if self._tag.exists() else ""
        try:
            with self._wanted.open(offset, etag) as response:
                if response.status != 206:
                    offset = 0
                    os.ftruncate(descriptor, 0)
                    self._tag.write_text(response.headers.get("ETag", ""))
                end = offset + int(response.headers["Content-Length"])
                for data in _contents(response):
                    offset = _append(descriptor, data, offset)
                    report(offset, end)
                    patience.renew()
        except InvalidInput as error:
            if error.code != "range-invalid":
                raise
            self._tag.unlink()  # complete, but not renamed, or of something else: begin again
            return None
        except Unreachable as error:
            patience.bear(error)
            return None
        return end if offset == end else None


class _Upload:
    """A file on its way into a disk."""

    def __init__(self, client: "Client", address: str, file: BinaryIO, format_: str) -> None:
        status = os.fstat(file.fileno())
        # another file, or the same changed meanwhile, must not be taken for the rest of this one
        facts = f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns}"
        self._source = hashlib.sha256(facts.encode()).hexdigest()[:32]
        self._client = client
        self._address = address
        self._descriptor = file.fileno()
        self._size_bytes = status.st_size
        self._format = format_

    def run(self, report: "Report") -> int:
        """Send what is missing; return the size."""
        from stratocache.cache.errors import Conflict, Unreachable

        patience = _Patience()
        while True:
            try:
                known = self._known()
                if known is not None and known["complete"] and patience.tried:
                    return self._size_bytes  # only the answer was lost
                under_way = known is not None and not known["complete"]
                self._send(known["offset_bytes"] if known and under_way else 0, report, patience)
                return self._size_bytes
            except Unreachable as error:
                patience.bear(error)
            except Conflict as error:
                if error.code != "upload-busy":  # by the request that was cut
                    raise
                patience.bear(error)
            patience.wait()

    def _known(self) -> "Document | None":
        """Return the upload of this very file, if there is one."""
        from stratocache.cache.errors import NotFound

        try:
            known = self._client.get(f"{self._address}/upload")
        except NotFound as error:
            if error.code != "upload-unknown":
                raise
            return None
        same = (known["source"], known["format"]) == (self._source, self._format)
        return known if same and known["total_bytes"] == self._size_bytes else None

    def _send(self, offset: int, report: "Report", patience: "_Patience") -> None:
        """Send the data of the file from an offset on, then say that the rest is zeros."""
        from stratocache.fs.sparse_file import extents

        complete = False
        for first, last, has_data in extents(self._descriptor, offset, self._size_bytes):
            for start in range(first, last if has_data else first, _PART_BYTES):
                body = os.pread(self._descriptor, min(_PART_BYTES, last - start), start)
                part = f"{start}-{start + len(body) - 1}"
                complete = self._put(part, offset, body)
                offset = start + len(body)
                patience.renew()
                report(offset, self._size_bytes)
        if not complete:
            self._put("*", offset, b"")
            report(self._size_bytes, self._size_bytes)

    def _put(self, part: str, offset: int, body: bytes) -> bool:
        headers = {
            "Content-Type": _MEDIA_TYPES[self._format],
            "Content-Range": f"bytes {part}/{self._size_bytes}",
            "Upload-Offset": str(offset),
            "Upload-Source": self._source,
        }
        with self._client.exchange("PUT", self._address, headers, body) as response:
            return response.status == 200 and b'"complete":true' in response.read()


class _Patience:
    """How long a transfer waits for a daemon that has gone away, or has no place for it."""

    def __init__(self) -> None:
        self.tried = False
        """Whether the daemon has been there at all."""
        self._deadline_s = 0.0
        self._turn_s = time.monotonic() + _PLACE_S
        self._pause_s = _PAUSE_S

    def renew(self) -> None:
        """Note that something was transferred."""
        self.tried = True
        self._deadline_s = time.monotonic() + _RECONNECT_S
        self._turn_s = time.monotonic() + _PLACE_S

    def bear(self, error: "StratocacheError") -> None:
        """Raise an error when it has gone on for too long, or from the beginning."""
        has_no_place = error.code in _NO_PLACE
        self._pause_s = _TURN_PAUSE_S if has_no_place else _PAUSE_S
        if time.monotonic() > (self._turn_s if has_no_place else self._deadline_s):
            raise error

    def wait(self) -> None:
        """Pause before the next attempt."""
        time.sleep(self._pause_s)


def _copy(wanted: _Wanted, output: BinaryIO, report: "Report") -> None:
    from stratocache.cache.errors import Unreachable

    with ExitStack() as opened:
        response = _opened(wanted, opened)
        done, end = 0, int(response.headers["Content-Length"])
        for data in _contents(response):
            output.write(data)
            done += len(data)
            report(done, end)
        output.flush()
    if done != end:
        raise Unreachable(
            "transfer-cut", f"The connection was cut after {done} of {end} bytes; try again."
        )


def _opened(wanted: _Wanted, held: ExitStack) -> "HTTPResponse":
    """Ask for all until there is a place for it."""
    from stratocache.cache.errors import Unreachable

    patience = _Patience()
    while True:
        try:
            return held.enter_context(wanted.open())
        except Unreachable as error:
            patience.bear(error)
        patience.wait()


def _contents(response: "HTTPResponse") -> Iterator[bytes]:
    """Yield a response's bytes until they end or the connection does."""
    with suppress(ConnectionError):
        while data := response.read(_PIECE_BYTES):
            yield data


def _append(descriptor: int, data: bytes, offset: int) -> int:
    from stratocache.fs.sparse_file import write_sparse

    write_sparse(descriptor, data, offset)
    os.ftruncate(descriptor, offset + len(data))
    return offset + len(data)


@contextmanager
def _open_regular(file: Path) -> Iterator[BinaryIO]:
    from stratocache.cache.errors import InvalidInput

    if not (file.exists() and stat.S_ISREG(file.stat().st_mode)):
        raise InvalidInput("file-unusable", f"{file} is not a regular file.", field="file")
    with file.open("rb", buffering=0) as source:
        yield source


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _format_of(name: str) -> str:
    return "qcow2" if name.endswith(".qcow2") else "raw"
