"""Files of an HTTP server that become disks."""

import bz2
import gzip
import hashlib
import lzma
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
import zstandard
from support.contents import MIB, allocated_bytes, patchwork, qcow2_of
from support.origins import Fault, OriginServer, Resource, origin_server

from stratocache.cache.configuration import Configuration, FetchSettings, SpaceSettings
from stratocache.cache.errors import (
    InvalidInput,
    NoSpace,
    NotFound,
    NotVerified,
    OriginFailed,
    Refused,
    StratocacheError,
)
from stratocache.cache.origin import Backoff
from stratocache.fs.content_import import Importer
from stratocache.fs.disks import DiskStore
from stratocache.fs.import_intents import ImportRequest

UUID = "00000000-0000-4000-8000-000000000001"
SIZE = 6 * MIB
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.ZstdCompressor().compress,
}


class Host:
    """A state directory, its disks, and imports into it."""

    def __init__(self, root: Path, *, reserve_bytes: int = 0) -> None:
        self.state_dir = root / "state"
        self.disks = DiskStore(self.state_dir, root / "run")
        self.progress: list[tuple[int, int | None]] = []
        self._configuration = Configuration(
            state_dir=self.state_dir,
            run_dir=root / "run",
            fetch=FetchSettings(attempts=2, read_timeout_s=10, max_image_bytes=64 * MIB),
            space=SpaceSettings(reserve_bytes=reserve_bytes),
        )

    def fetch(self, url: str, *, cancel_at: int | None = None, **facts: Any) -> int:
        """Fetch a file; the download is cancelled once so many bytes are there, if given."""
        return trio.run(self._fetch, ImportRequest(url, **facts), cancel_at)

    async def _fetch(self, request: ImportRequest, cancel_at: int | None) -> int:
        size_bytes = -1
        async with httpx.AsyncClient(trust_env=False) as client:
            importer = Importer(self._configuration, client, backoff=Backoff(0.001, 0.02))
            with trio.CancelScope() as scope:

                def progress(done: int, total: int | None) -> None:
                    self.progress.append((done, total))
                    if cancel_at is not None and done >= cancel_at:
                        scope.cancel()

                size_bytes = await importer.fetch(UUID, request, progress)
        return size_bytes

    def install(self, size_bytes: int) -> bytes:
        """Make what was fetched a disk; return its bytes."""

        async def install() -> None:
            async with httpx.AsyncClient(trust_env=False) as client:
                importer = Importer(self._configuration, client)
                importer.install(self.disks, UUID, size_bytes)
                importer.install(self.disks, UUID, size_bytes)  # changes nothing
                importer.discard(UUID)

        trio.run(install)
        return self.disks.data_path(UUID).read_bytes()

    def transfers(self) -> list[Path]:
        """Return what imports have left."""
        return list((self.state_dir / "transfers").iterdir())


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A host without a reserve."""
    return Host(tmp_path)


@pytest.fixture
def origin() -> Iterator[OriginServer]:
    """An HTTP server."""
    with origin_server() as server:
        yield server


def test_raw_file_becomes_a_sparse_disk(host: Host, origin: OriginServer) -> None:
    """A raw file is a disk of its size, with holes for its zeros; nothing else is left."""
    content = patchwork(SIZE)
    url = origin.add("/disk.img", content)
    size_bytes = host.fetch(url, sha256=hashlib.sha256(content).hexdigest().upper())
    installed = host.install(size_bytes)

    assert size_bytes == SIZE
    assert installed == content
    assert allocated_bytes(host.disks.data_path(UUID)) < 5 * MIB
    assert host.disks.form(UUID) == "raw"
    assert host.progress[-1] == (SIZE, SIZE)
    assert host.transfers() == []


@pytest.mark.parametrize("compression", COMPRESSORS)
def test_compression_follows_the_name(host: Host, origin: OriginServer, compression: str) -> None:
    """A compressed file is decompressed; its digest is that of the file as served."""
    content = patchwork(SIZE)
    packed = COMPRESSORS[compression](content)
    url = origin.add(f"/disk.img.{compression}", packed)
    size_bytes = host.fetch(url, sha512=hashlib.sha512(packed).hexdigest())

    assert host.install(size_bytes) == content


@pytest.mark.parametrize("packed", [False, True])
def test_qcow2_is_converted(host: Host, origin: OriginServer, tmp_path: Path, packed: bool) -> None:
    """qcow2, compressed or not, becomes its virtual disk."""
    content = patchwork(SIZE)
    (tmp_path / "raw").write_bytes(content)
    container = qcow2_of(tmp_path / "raw", tmp_path / "qcow2").read_bytes()
    if packed:
        url = origin.add("/disk.qcow2.gz?x=1", gzip.compress(container))
    else:
        url = origin.add("/disk", container)
    facts: dict[str, Any] = {} if packed else {"format": "qcow2"}
    size_bytes = host.fetch(url, **facts)

    assert host.install(size_bytes) == content
    assert allocated_bytes(host.disks.data_path(UUID)) < 5 * MIB


def test_raw_content_that_looks_like_qcow2_stays_raw(
    host: Host, origin: OriginServer, tmp_path: Path
) -> None:
    """The format is never guessed from the content."""
    (tmp_path / "raw").write_bytes(b"inner" * 999)
    container = qcow2_of(tmp_path / "raw", tmp_path / "qcow2").read_bytes()
    size_bytes = host.fetch(origin.add("/disk.img", container))

    assert host.install(size_bytes).startswith(b"QFI\xfb")


def test_disk_may_be_larger(host: Host, origin: OriginServer) -> None:
    """A size that is given is the disk's; an odd length is filled up to whole sectors."""
    url = origin.add("/disk.img", b"x" * (MIB + 1))

    assert host.fetch(url, size_bytes=4 * MIB) == 4 * MIB
    assert host.install(4 * MIB) == (b"x" * (MIB + 1)).ljust(4 * MIB, b"\0")
    assert Host.fetch(host, url) == MIB + 512


def test_cancelled_download_goes_on(host: Host, origin: OriginServer) -> None:
    """A download that was stopped, as by the death of the process, continues where it was."""
    content = hashlib.shake_128(b"all").digest(SIZE)
    url = origin.add("/disk.img", content)
    assert host.fetch(url, cancel_at=3 * MIB) == -1
    sent = origin.sent_bytes("/disk.img")
    size_bytes = host.fetch(url)

    assert host.install(size_bytes) == content
    assert origin.log[-1].range is not None
    assert origin.sent_bytes("/disk.img") - sent < SIZE


def test_fetch_and_install_may_be_repeated(host: Host, origin: OriginServer) -> None:
    """What is done already is not done again."""
    content = patchwork(SIZE)
    url = origin.add("/disk.img", content)
    assert host.fetch(url) == host.fetch(url) == SIZE
    assert len(origin.log) == 1

    assert host.install(SIZE) == content


def test_install_needs_a_fetch(host: Host) -> None:
    """A disk that was never fetched is not made."""
    with pytest.raises(NotFound, match="Nothing was imported"):
        host.install(MIB)
    assert host.disks.form(UUID) is None


def _bomb() -> bytes:
    return gzip.compress(bytes(80 * MIB), 1)


@pytest.mark.parametrize(
    ("name", "content", "facts", "error", "code"),
    [("disk.img", b"x", {"sha256": "0" * 64}, NotVerified, "digest-mismatch"),
     ("disk.img", b"x", {"sha512": "0" * 128}, NotVerified, "digest-mismatch"),
     ("disk.img", b"x", {"sha256": "abc"}, InvalidInput, "digest-invalid"),
     ("disk.img", b"x" * (2 * MIB), {"size_bytes": MIB}, InvalidInput, "size-too-small"),
     ("disk.img.gz", b"no gzip at all", {}, NotVerified, "source-corrupt"),
     ("disk.img.gz", gzip.compress(b"x" * 9999, mtime=0)[:-9], {}, NotVerified, "source-truncated"),
     ("disk.img.gz", _bomb(), {}, NotVerified, "decompression-bomb"),
     ("disk.img", bytes(65 * MIB), {}, NotVerified, "size-mismatch"),
     ("disk.qcow2", b"no qcow2", {}, NotVerified, "image-format")],
)  # fmt: skip
def test_bad_file_leaves_nothing(
    host: Host, origin: OriginServer, name: str, content: bytes, facts: dict[str, Any],
    error: type[StratocacheError], code: str,
) -> None:  # fmt: skip
    """A file that is not what was promised, or no disk, is refused and gone."""
    url = origin.add(f"/{name}", content)
    with pytest.raises(error) as raised:
        host.fetch(url, **facts)

    assert raised.value.code == code
    assert not (host.state_dir / "transfers").exists() or host.transfers() == []


def test_qcow2_with_a_backing_file_is_refused(
    host: Host, origin: OriginServer, tmp_path: Path
) -> None:
    """A qcow2 file that refers to a file of this host is not opened."""
    (tmp_path / "secret").write_bytes(b"s" * 65536)
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(tmp_path / "secret"),
         str(tmp_path / "backed")], check=True,
    )  # fmt: skip
    url = origin.add("/disk.qcow2", (tmp_path / "backed").read_bytes())
    with pytest.raises(NotVerified) as raised:
        host.fetch(url)

    assert raised.value.code == "image-backing-file"


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://", "/etc/passwd", "http://a b/",
     "http://127.0.0.1/" + "x" * 5000],
)  # fmt: skip
def test_only_http_addresses(host: Host, url: str) -> None:
    """Nothing but an http or https address is asked for."""
    with pytest.raises(InvalidInput) as raised:
        host.fetch(url)

    assert (raised.value.code, raised.value.field) == ("url-invalid", "import_url")


def test_redirect_to_a_file_is_refused(host: Host, origin: OriginServer) -> None:
    """A server cannot lead an import to a file of this host."""
    fault = Fault(status=302, headers={"Location": "file:///etc/passwd"})
    resource = Resource(b"x")
    resource.faults.append(fault)
    with pytest.raises(Refused) as raised:
        host.fetch(origin.add("/disk.img", resource))

    assert raised.value.code == "location-refused"


def test_servers_that_fail(host: Host, origin: OriginServer) -> None:
    """What is not there, and a server that does not recover, are told apart."""
    resource = Resource(b"x")
    resource.faults += [Fault(status=503), Fault(status=503)]
    broken = origin.add("/broken", resource)
    with pytest.raises(NotFound):
        host.fetch(origin.url + "/nothing")
    with pytest.raises(OriginFailed):
        host.fetch(broken)

    assert host.transfers() == []


def test_reserve_is_left_alone(tmp_path: Path, origin: OriginServer) -> None:
    """An import that would take the reserve fails and gives back what it took."""
    host = Host(tmp_path, reserve_bytes=2**60)
    with pytest.raises(NoSpace):
        host.fetch(origin.add("/disk.img", b"x" * MIB))

    assert host.transfers() == []
