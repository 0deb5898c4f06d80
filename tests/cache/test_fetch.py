"""Fetching whole images: what is published, and that every failure leaves nothing behind."""

import bz2
import gzip
import hashlib
import lzma
import os
import signal
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
import trio
import zstandard
from support.origins import Fault, OriginServer, Resource

from stratocache.cache.chunks import CHUNK_BYTES, ChunkStore
from stratocache.cache.configuration import Configuration, FetchSettings, SpaceSettings
from stratocache.cache.entry import Compression, Endorser, Entry, ImageFormat
from stratocache.cache.errors import (
    NoSpace,
    NotFound,
    NotVerified,
    OriginFailed,
    Refused,
)
from stratocache.cache.fetch import Fetcher
from stratocache.cache.images import ImageStore
from stratocache.cache.origin import Backoff
from stratocache.cache.promises import FetchedImage
from stratocache.cache.room import CacheSpace

MIB = 1024**2
IDENTIFIER = "MMZu9WvwKIro-rtBQfDk4PsKO7_"
ALGORITHMS = ("md5", "sha1", "sha256", "sha512")
COMPRESSORS: dict[Compression, Callable[[bytes], bytes]] = {
    "none": bytes,
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def _image(size_bytes: int = 5 * MIB + 70001) -> bytes:
    """Random bytes at both ends, zeros between."""
    ends = hashlib.shake_128(b"ends").digest(2 * MIB + 70001)
    return ends[:MIB] + bytes(size_bytes - len(ends)) + ends[MIB:]


def _entry(
    data: bytes,
    *locations: str,
    compression: Compression = "none",
    format_: ImageFormat = "raw",
    algorithms: tuple[str, ...] = ALGORITHMS,
    **changes: object,
) -> Entry:
    entry = Entry(
        catalogue="test",
        identifier=IDENTIFIER,
        size_bytes=len(data),
        digests={name: hashlib.new(name, data).hexdigest() for name in algorithms},
        locations=locations,
        compression=compression,
        format=format_,
        endorser=Endorser(email="a@example.org", subject="CN=a", issuer="CN=a"),
        endorsed_at=datetime(2026, 11, 1, tzinfo=UTC),
        trust="signed",
    )
    return entry.model_copy(update=changes)


class Stopped(Exception):
    """The fetch was cancelled."""


class Host:
    """A state directory and the fetcher on it."""

    def __init__(self, state_dir: Path, *, reserve_bytes: int = 0) -> None:
        self.state_dir = state_dir
        self.configuration = Configuration(
            state_dir=state_dir,
            fetch=FetchSettings(
                attempts=2, connect_timeout_s=5, read_timeout_s=10, max_image_bytes=1024 * MIB
            ),
            space=SpaceSettings(reserve_bytes=reserve_bytes),
        )
        self.chunks = ChunkStore(state_dir / "chunks")
        self.images = ImageStore(state_dir, self.chunks)
        self.progress: list[tuple[int, int | None]] = []

    def fetch(self, entry: Entry, *, cancel_at: int | None = None) -> FetchedImage:
        """Fetch an entry in a loop of its own; cancelled once so many bytes are done, if given."""
        return trio.run(self._fetch, entry, cancel_at)

    async def _fetch(self, entry: Entry, cancel_at: int | None) -> FetchedImage:
        backoff = Backoff(base_s=0.001, limit_s=0.02)
        async with httpx.AsyncClient(trust_env=False) as client:
            fetcher = Fetcher(self.configuration, self.images, self.chunks, client, backoff=backoff)
            with trio.CancelScope() as scope:

                def progress(done: int, total: int | None) -> None:
                    self.progress.append((done, total))
                    if cancel_at is not None and done >= cancel_at:
                        scope.cancel()

                return await fetcher.fetch(entry, progress)
        raise Stopped

    def fetcher(self) -> Fetcher:
        """Return a fetcher for the calls that need no loop."""
        return Fetcher(self.configuration, self.images, self.chunks, httpx.AsyncClient())

    def leftovers(self) -> list[str]:
        """Return every file that is not a directory of the stores or the index."""
        return sorted(
            str(path.relative_to(self.state_dir))
            for path in self.state_dir.rglob("*")
            if (path.is_file() and not path.name.startswith("cache.db"))
            or path.parent.name == "stage"
        )

    def read(self, identifier: str = IDENTIFIER) -> bytes:
        """Return a whole published image."""
        reader = self.images.reader(identifier)
        return reader.read_blocking(0, reader.size_bytes)

    def close(self) -> None:
        """Close the stores."""
        self.chunks.close()


@pytest.fixture
def host(state_dir: Path) -> Iterator[Host]:
    """A host with an empty state directory."""
    host = Host(state_dir)
    yield host
    host.close()


def _assert_published(host: Host, image: bytes, fetched: FetchedImage) -> None:
    assert fetched == FetchedImage(IDENTIFIER, len(image), hashlib.sha256(image).hexdigest())
    assert host.images.identifiers() == [IDENTIFIER]
    assert host.read() == image
    assert list((host.state_dir / "stage").iterdir()) == []
    assert len(host.leftovers()) == 2 + host.chunks.statistics().chunks


@pytest.mark.parametrize("compression", ["none", "gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("scheme", ["http", "file"])
def test_a_raw_image_is_published(
    host: Host, origin: OriginServer, tmp_path: Path, compression: Compression, scheme: str
) -> None:
    """From either kind of location and under every compression the image reads back."""
    image = _image()
    source = COMPRESSORS[compression](image)
    (tmp_path / "source").write_bytes(source)
    location = origin.add("/source", source) if scheme == "http" else f"file://{tmp_path}/source"

    fetched = host.fetch(_entry(image, location, compression=compression))

    _assert_published(host, image, fetched)
    assert host.progress[-1] == (len(source), len(source))
    assert host.chunks.statistics().chunks == 5


@pytest.mark.parametrize("size_bytes", [1, 512, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_small_images_are_published(host: Host, origin: OriginServer, size_bytes: int) -> None:
    """An image may be of any size from one byte."""
    image = hashlib.shake_128(b"small").digest(size_bytes)

    fetched = host.fetch(_entry(image, origin.add("/source", image)))

    _assert_published(host, image, fetched)


@pytest.mark.parametrize("scheme", ["http", "file"])
@pytest.mark.parametrize("compression", ["none", "gz"])
def test_a_qcow2_image_is_published_as_its_disk(
    host: Host, origin: OriginServer, tmp_path: Path, compression: Compression, scheme: str
) -> None:
    """Digests are those of the container, the image is its virtual disk."""
    image, container = _qcow2(tmp_path)
    source = COMPRESSORS[compression](container)
    (tmp_path / "source").write_bytes(source)
    location = origin.add("/source", source) if scheme == "http" else f"file://{tmp_path}/source"

    fetched = host.fetch(_entry(container, location, compression=compression, format_="qcow2"))

    _assert_published(host, image, fetched)


def test_a_raw_image_that_looks_like_qcow2_stays_raw(
    host: Host, origin: OriginServer, tmp_path: Path
) -> None:
    """The format is the entry's; content that starts like an overlay is not opened as one."""
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "/etc/passwd",
         tmp_path / "trap", "8M"],
        check=True,
    )  # fmt: skip
    image = (tmp_path / "trap").read_bytes()

    fetched = host.fetch(_entry(image, origin.add("/source", image)))

    _assert_published(host, image, fetched)


def test_the_next_location_is_taken(host: Host, origin: OriginServer) -> None:
    """A missing and a lying location do not keep the image from coming from the third."""
    image = _image()
    wrong = origin.add("/wrong", image[::-1])

    fetched = host.fetch(_entry(image, origin.url + "/missing", wrong, origin.add("/right", image)))

    _assert_published(host, image, fetched)
    assert [request.path for request in origin.log] == ["/missing", "/wrong", "/right"]


def test_a_busy_location_keeps_nobody_from_another(
    host: Host, origin: OriginServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that wants to be asked again later than one would wait is passed over, and asked again
    when no other has the image."""
    data = os.urandom(MIB)
    monkeypatch.setattr("stratocache.cache.fetch._WAIT_MAX_S", 0.01)  # of pauses of 0.02 s
    later = Fault(status=429, headers={"Retry-After": "3600"})
    busy = origin.add("/busy", Resource(data, faults=deque([later])))
    good = origin.add("/good", data)

    host.fetch(_entry(data, busy, good))
    assert [request.path for request in origin.log] == ["/busy", "/good"]

    host.images.remove(IDENTIFIER)
    origin.resources["/busy"].faults.append(later)
    host.fetch(_entry(data, busy, origin.url + "/gone"))
    assert [request.path for request in origin.log][2:] == ["/busy", "/gone", "/busy"]


def test_a_cut_download_is_not_fetched_twice(host: Host, origin: OriginServer) -> None:
    """A connection cut in the middle costs no byte."""
    image = _image()
    url = origin.add("/source", Resource(image, faults=deque([Fault(cut_after_bytes=2_345_678)])))

    fetched = host.fetch(_entry(image, url))

    _assert_published(host, image, fetched)
    assert origin.sent_bytes("/source") == len(image)


def test_a_stopped_process_continues_at_its_next_start(
    state_dir: Path, origin: OriginServer
) -> None:
    """What was downloaded before the process ended is kept by the sweep and not fetched again."""
    image = _image()
    entry = _stopped_midway(state_dir, origin, image)
    stage = state_dir / "stage" / IDENTIFIER
    kept = (stage / "source.part").stat().st_size
    assert kept >= MIB

    host = Host(state_dir)
    host.fetcher().sweep([IDENTIFIER])
    fetched = host.fetch(entry)

    _assert_published(host, image, fetched)
    assert origin.log[-1].range == f"bytes={kept}-"
    assert origin.log[-1].sent_bytes == len(image) - kept
    host.close()


def test_the_sweep_forgets_what_nobody_wants(state_dir: Path, origin: OriginServer) -> None:
    """At the next start the stage of an unknown identifier goes."""
    _stopped_midway(state_dir, origin, _image())
    (state_dir / "stage" / "stray").write_bytes(b"x")

    host = Host(state_dir)
    host.fetcher().sweep([])

    assert host.leftovers() == []
    host.close()


def test_a_cancelled_fetch_leaves_nothing_once_discarded(
    state_dir: Path, origin: OriginServer
) -> None:
    """Cancel, then discard: the state directory is as before."""
    _stopped_midway(state_dir, origin, _image())

    host = Host(state_dir)
    host.fetcher().discard(IDENTIFIER)

    assert host.leftovers() == []
    host.close()


def _stopped_midway(state_dir: Path, origin: OriginServer, image: bytes) -> Entry:
    """Fetch until a part is on disk, then cancel, as a stopping process does."""
    release = threading.Event()
    fault = Fault(cut_after_bytes=len(image) // 2, hold=release)
    entry = _entry(image, origin.add("/source", Resource(image, faults=deque([fault]))))
    host = Host(state_dir)
    with pytest.raises(Stopped):
        host.fetch(entry, cancel_at=MIB)
    release.set()
    host.close()
    return entry


def test_a_cancel_while_hashing_leaves_no_chunk(host: Host, tmp_path: Path) -> None:
    """Chunks stored before the cancel go with it."""
    image = hashlib.shake_128(b"long").digest(64 * MIB)
    (tmp_path / "source").write_bytes(image)

    with pytest.raises(Stopped):
        host.fetch(_entry(image, f"file://{tmp_path}/source"), cancel_at=1)

    host.fetcher().discard(IDENTIFIER)
    assert host.leftovers() == []
    assert 0 < host.progress[-1][0] < len(image)


KILLED = """
import sys
from pathlib import Path
import httpx, trio
from stratocache.cache.chunks import ChunkStore
from stratocache.cache.configuration import Configuration
from stratocache.cache.entry import Entry
from stratocache.cache.fetch import Fetcher
from stratocache.cache.images import ImageStore

def progress(done, total):
    if done > int(sys.argv[3]):
        print(done, flush=True)
        sys.stdin.read()  # to be killed here

async def main():
    configuration = Configuration(state_dir=Path(sys.argv[1]), space={"reserve_bytes": 0})
    chunks = ChunkStore(configuration.state_dir / "chunks")
    images = ImageStore(configuration.state_dir, chunks)
    async with httpx.AsyncClient(trust_env=False) as client:
        fetcher = Fetcher(configuration, images, chunks, client)
        entry = Entry.model_validate_json(sys.argv[2])
        await fetcher.fetch(entry, progress)

trio.run(main)
"""


def _killed_at_progress(state_dir: Path, entry: Entry, done_bytes: int = 0) -> None:
    """Fetch in a process of its own and kill it where it first reports more bytes than that."""
    command = [
        sys.executable, "-c", KILLED, str(state_dir), entry.model_dump_json(), str(done_bytes)
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) > 0
        process.kill()
    assert process.returncode == -signal.SIGKILL


def test_a_process_killed_while_it_downloads_continues(
    state_dir: Path, origin: OriginServer
) -> None:
    """After kill -9 the next process asks for the rest only."""
    image = _image()
    release = threading.Event()
    fault = Fault(cut_after_bytes=3 * MIB, hold=release)
    entry = _entry(image, origin.add("/source", Resource(image, faults=deque([fault]))))
    _killed_at_progress(state_dir, entry)
    release.set()
    kept = (state_dir / "stage" / IDENTIFIER / "source.part").stat().st_size

    host = Host(state_dir)
    host.fetcher().sweep([IDENTIFIER])
    fetched = host.fetch(entry)

    _assert_published(host, image, fetched)
    assert kept >= MIB
    assert origin.log[-1].range == f"bytes={kept}-"
    host.close()


@pytest.mark.parametrize("keep", [[], [IDENTIFIER]])
def test_a_process_killed_while_it_stores_chunks_leaves_none(
    state_dir: Path, tmp_path: Path, keep: list[str]
) -> None:
    """After kill -9 the sweep removes the chunks of no image; the fetch works again."""
    image = hashlib.shake_128(b"long").digest(48 * MIB)
    (tmp_path / "source").write_bytes(image)
    entry = _entry(image, f"file://{tmp_path}/source")
    _killed_at_progress(state_dir, entry, 40 * MIB)  # more than may wait to be stored

    host = Host(state_dir)
    assert len(host.leftovers()) > 1
    host.fetcher().sweep(keep)

    assert host.leftovers() == [f"stage/{identifier}" for identifier in keep]
    assert host.chunks.statistics().chunks == 0
    fetched = host.fetch(entry)
    _assert_published(host, image, fetched)
    host.close()


def test_a_continued_download_that_is_not_verified_is_tried_whole(
    state_dir: Path, origin: OriginServer
) -> None:
    """A part spoilt while the host was down does not make the image wrong for ever."""
    image = _image()
    entry = _stopped_midway(state_dir, origin, image)
    with (state_dir / "stage" / IDENTIFIER / "source.part").open("r+b") as file:
        file.write(bytes(1000))

    host = Host(state_dir)
    fetched = host.fetch(entry)

    _assert_published(host, image, fetched)
    assert origin.log[-1].range is None
    host.close()


def _failing(host: Host, entry: Entry) -> tuple[type[Exception], str, str]:
    """Return class, code and sentence of a fetch's failure; nothing may be left of it."""
    with pytest.raises((NotVerified, NotFound, OriginFailed, Refused, NoSpace)) as caught:
        host.fetch(entry)
    assert host.leftovers() == []
    assert host.chunks.statistics().chunks == 0
    assert host.images.identifiers() == []
    return type(caught.value), caught.value.code, caught.value.message


def test_404_everywhere_is_not_found(host: Host, origin: OriginServer) -> None:
    """Every location is named in the error."""
    first, second = origin.url + "/one", origin.url + "/two"

    kind, code, message = _failing(host, _entry(b"x", first, second))

    assert (kind, code) == (NotFound, "location-not-found")
    assert first in message
    assert second in message


def test_a_dead_server_is_an_origin_failure(host: Host, origin: OriginServer) -> None:
    """Not all locations were 404: trying again may help, so it is not "not found"."""
    dead = "http://127.0.0.1:1/image"

    kind, code, message = _failing(host, _entry(b"x", origin.url + "/missing", dead))

    assert (kind, code) == (OriginFailed, "origin-failed")
    assert dead in message


def test_no_location_is_not_found(host: Host) -> None:
    """An entry without locations has its own sentence."""
    assert _failing(host, _entry(b"x"))[:2] == (NotFound, "location-not-found")


@pytest.mark.parametrize("change", [-1, 1])
def test_a_wrong_size_is_a_mismatch(host: Host, origin: OriginServer, change: int) -> None:
    """A file one byte shorter or longer than promised is refused."""
    image = _image()
    url = origin.add("/source", image)

    kind, code, _ = _failing(host, _entry(image, url, size_bytes=len(image) + change))

    assert (kind, code) == (NotVerified, "size-mismatch")
    assert host.progress == []


def test_a_short_compressed_image_is_a_mismatch(host: Host, origin: OriginServer) -> None:
    """A whole stream of too few bytes is not called truncated."""
    image = _image()
    url = origin.add("/source", gzip.compress(image[:-1]))

    assert _failing(host, _entry(image, url, compression="gz"))[1] == "size-mismatch"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_promised_digest_must_be_right(
    host: Host, origin: OriginServer, algorithm: str
) -> None:
    """One wrong digest of four is enough; expected and got are named."""
    image = _image()
    entry = _entry(image, origin.add("/source", image))
    promised = hashlib.new(algorithm, b"other").hexdigest()

    kind, code, message = _failing(
        host, entry.model_copy(update={"digests": entry.digests | {algorithm: promised}})
    )

    assert (kind, code) == (NotVerified, "digest-mismatch")
    assert algorithm in message
    assert promised in message
    assert entry.digests[algorithm] in message


def test_weak_digests_alone_prove_nothing(host: Host, origin: OriginServer) -> None:
    """With SHA-1 and MD5 only the origin is not even asked."""
    image = _image()
    entry = _entry(image, origin.add("/source", image), algorithms=("md5", "sha1"))

    assert _failing(host, entry)[:2] == (Refused, "digest-too-weak")
    assert origin.log == []


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz", "zst"])
def test_a_truncated_source_is_refused(
    host: Host, origin: OriginServer, compression: Compression
) -> None:
    """A compressed file that lacks its end is named as such."""
    image = _image()
    source = COMPRESSORS[compression](image)[:-10]
    url = origin.add("/source", source)

    assert _failing(host, _entry(image, url, compression=compression))[1] == "source-truncated"


def test_a_corrupt_source_is_refused(host: Host, origin: OriginServer) -> None:
    """An HTML page in place of a gzip file is named as such."""
    url = origin.add("/source", b"<html>" * 100)

    assert _failing(host, _entry(_image(), url, compression="gz"))[1] == "source-corrupt"


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz", "zst"])
def test_a_decompression_bomb_is_stopped(
    host: Host, origin: OriginServer, compression: Compression
) -> None:
    """A stream of more than was promised ends where the promise does."""
    image = _image()
    bomb = COMPRESSORS[compression](image + bytes(32 * MIB))
    url = origin.add("/source", bomb)

    assert _failing(host, _entry(image, url, compression=compression))[1] == "decompression-bomb"


def test_an_oversized_compressed_source_is_not_downloaded(host: Host, origin: OriginServer) -> None:
    """A compressed file much longer than its content could be is refused by its length."""
    url = origin.add("/source", bytes(3 * MIB))

    kind, code, _ = _failing(host, _entry(b"x" * 1000, url, compression="xz"))

    assert (kind, code) == (NotVerified, "size-mismatch")
    assert host.progress == []


def test_an_image_over_the_limit_is_not_fetched(host: Host, origin: OriginServer) -> None:
    """The site's limit is judged before anything is asked for."""
    entry = _entry(b"x", origin.add("/source", b"x"), size_bytes=2048 * MIB)

    assert _failing(host, entry)[1] == "image-too-large"
    assert origin.log == []


def test_a_backing_file_is_refused(host: Host, origin: OriginServer, tmp_path: Path) -> None:
    """An endorsed qcow2 overlay does not read this host's files."""
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "/etc/shadow",
         tmp_path / "trap", "8M"],
        check=True,
    )  # fmt: skip
    container = (tmp_path / "trap").read_bytes()
    url = origin.add("/source", container)

    assert _failing(host, _entry(container, url, format_="qcow2"))[1] == "image-backing-file"


def test_an_absurd_virtual_size_is_refused(
    host: Host, origin: OriginServer, tmp_path: Path
) -> None:
    """A small container that claims an exabyte is refused by the limit."""
    _, container = _qcow2(tmp_path)
    container = container[:24] + struct.pack(">Q", 2**60) + container[32:]
    url = origin.add("/source", container)

    assert _failing(host, _entry(container, url, format_="qcow2"))[1] == "image-too-large"


def test_a_raw_image_is_not_taken_for_qcow2(host: Host, origin: OriginServer) -> None:
    """What an entry calls qcow2 must be."""
    image = _image()
    url = origin.add("/source", image)

    assert _failing(host, _entry(image, url, format_="qcow2"))[1] == "image-format"


@pytest.mark.parametrize("target", ["/dev/zero", "/etc", "/nowhere/image"])
def test_a_location_that_is_no_plain_file_is_refused(host: Host, target: str) -> None:
    """Devices and folders are refused, missing files not found."""
    kind, code, _ = _failing(host, _entry(b"x", f"file://{target}"))

    missing = (NotFound, "location-not-found")
    assert (kind, code) == (missing if "nowhere" in target else (Refused, "location-refused"))


def test_another_scheme_is_refused(host: Host) -> None:
    """Only http, https and file are locations."""
    assert _failing(host, _entry(b"x", "ftp://127.0.0.1/x"))[:2] == (Refused, "location-refused")


def test_the_reserve_is_left_alone(state_dir: Path, origin: OriginServer) -> None:
    """When free space is all reserve nothing is downloaded."""
    host = Host(state_dir, reserve_bytes=2**60)
    image = _image()

    kind, code, _ = _failing(host, _entry(image, origin.add("/source", image)))

    assert (kind, code) == (NoSpace, "no-space")
    assert host.progress == []
    host.close()


def test_room_is_asked_for_when_it_is_used(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks has stored all that it asked for before; zeros need no room."""
    image = hashlib.shake_128(b"room").digest(24 * MIB) + bytes(8 * MIB)
    (tmp_path / "source").write_bytes(image)
    asked: list[int] = []
    ahead: list[int] = []

    def obtain(_: CacheSpace, size_bytes: int) -> None:
        ahead.append(sum(asked) - host.chunks.statistics().size_bytes)
        asked.append(size_bytes)

    monkeypatch.setattr(CacheSpace, "obtain_blocking", obtain)
    host.fetch(_entry(image, f"file://{tmp_path}/source"))

    assert set(ahead) == {0}
    assert sum(asked) == 24 * MIB


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8M", "none", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


@pytest.mark.root
@pytest.mark.parametrize("case", ["download", "chunks", "container", "conversion"])
def test_a_full_disk_leaves_nothing(
    small_disk: Path, origin: OriginServer, tmp_path: Path, case: str
) -> None:
    """Whichever write meets the end of the disk, the error is the same and all space comes back."""
    image = hashlib.shake_128(b"full").digest(16 * MIB)
    host = Host(small_disk)
    before = os.statvfs(small_disk).f_bavail
    match case:
        case "download":
            data = origin.add("/source", Resource(image, declare_length=False))
            entry = _entry(image, data)
        case "chunks":
            (tmp_path / "source").write_bytes(image)
            entry = _entry(image, f"file://{tmp_path}/source")
        case "container":
            (tmp_path / "source").write_bytes(image)
            entry = _entry(image, f"file://{tmp_path}/source", format_="qcow2")
        case _:
            _, container = _qcow2(tmp_path, bytes(range(256)) * 65536, "-c")
            assert len(container) < 4 * MIB
            entry = _entry(container, origin.add("/source", container), format_="qcow2")

    kind, code, _ = _failing(host, entry)

    assert (kind, code) == (NoSpace, "no-space")
    pages_of_directories_and_index = 400
    assert os.statvfs(small_disk).f_bavail > before - pages_of_directories_and_index
    host.close()


def test_a_second_image_shares_chunks(host: Host, origin: OriginServer) -> None:
    """Two images with a common half store it once; a failed third takes nothing of theirs."""
    image = _image()
    other = image[: 3 * MIB] + hashlib.shake_128(b"other").digest(2 * MIB)
    host.fetch(_entry(image, origin.add("/one", image)))
    stored = host.chunks.statistics().chunks
    host.fetch(_entry(other, origin.add("/two", other), identifier="other"))
    assert host.chunks.statistics().chunks == stored + 4

    third = _entry(image, origin.add("/three", image), identifier="third")
    with pytest.raises(NotVerified):
        host.fetch(third.model_copy(update={"digests": {"sha256": "00" * 32}}))

    assert host.read() == image
    assert host.read("other") == other
    assert host.images.identifiers() == [IDENTIFIER, "other"]
    assert host.chunks.statistics().chunks == stored + 4


def _qcow2(directory: Path, image: bytes = b"", *options: str) -> tuple[bytes, bytes]:
    image = image or _image(5 * MIB)
    (directory / "raw").write_bytes(image)
    subprocess.run(
        ["qemu-img", "convert", "-O", "qcow2", *options, directory / "raw", directory / "qcow2"],
        check=True,
    )
    return image, (directory / "qcow2").read_bytes()
