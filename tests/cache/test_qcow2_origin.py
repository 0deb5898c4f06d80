"""qcow2 images read by ranges: files of the real qemu-img, and files that lie."""

import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.contents import qcow2_of
from support.lazy import LazyHost, entry_of, manifest_of, some_image
from support.nginx import Nginx
from support.origins import OriginServer

from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.completion import Completion
from stratocache.cache.demand import ChunkFetcher
from stratocache.cache.entry import EndorsedIndex
from stratocache.cache.errors import OriginFailed
from stratocache.cache.origin import Backoff

IMAGE = (
    some_image(40, zero=(3, 4, 20)) + bytes(4096) + b"text " * 20000 + bytes(4096 - 100000 % 512)
)
IMAGE = IMAGE[: len(IMAGE) // 512 * 512]


@pytest.fixture
def host(state_dir: Path) -> Iterator[LazyHost]:
    """A host without a chunk."""
    host = LazyHost(state_dir, demand_timeout_s=3)
    yield host
    host.close()


def _qcow2(tmp_path: Path, *options: str) -> bytes:
    raw = tmp_path / "image.raw"
    raw.write_bytes(IMAGE)
    return qcow2_of(raw, tmp_path / "image.qcow2", *options).read_bytes()


def _add(host: LazyHost, packed: bytes, *locations: str) -> str:
    """Know an image by the index of its disk; the entry describes the file."""
    index = EndorsedIndex(url=f"{locations[0]}.caibx", sha256="0" * 64)
    entry = entry_of(packed, *locations, index=index, format="qcow2")
    host.entries[entry.identifier] = entry
    host.images.publish(entry.identifier, manifest_of(IMAGE))
    return entry.identifier


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("-c",),
        ("-c", "-o", "compression_type=zstd"),
        ("-o", "cluster_size=4k"),
        ("-o", "cluster_size=2M"),
        ("-o", "compat=0.10"),
    ],
    ids=["plain", "deflate", "zstd", "4k", "2M", "version-2"],
)
def test_any_chunk_of_a_qcow2_file_comes_first(
    host: LazyHost, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """From a real nginx: a read costs the clusters it touches and tables; in the end all is here."""
    packed = _qcow2(tmp_path, *options)
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "image").write_bytes(packed)
    with Nginx(tmp_path / "nginx", folder) as nginx:
        identifier = _add(host, packed, f"{nginx.url}/image")

        async def read(fetcher: ChunkFetcher) -> None:
            reader = host.images.reader(identifier)
            for index in (38, 3, 0, 40):
                data = await reader.read(index * CHUNK_BYTES, CHUNK_BYTES)
                assert data == IMAGE[index * CHUNK_BYTES :][:CHUNK_BYTES]
            moved_bytes.append(fetcher.traffic.images[identifier].remote_bytes)

        async def complete(fetcher: ChunkFetcher) -> None:
            completion = Completion(fetcher, host.images, attempts=2, backoff=Backoff(0.001, 0.01))
            found = await completion.complete(host.entries[identifier], [], lambda *_: None)
            assert found.size_bytes == len(IMAGE)

        moved_bytes: list[int] = []
        host.run(read)
        host.run(complete)
        sent_bytes = nginx.sent_bytes()

    assert host.images.reader(identifier).read_blocking(0, len(IMAGE)) == IMAGE
    assert moved_bytes[0] < 16 * CHUNK_BYTES
    assert sent_bytes < 1.3 * len(packed) + 16 * CHUNK_BYTES


def test_a_file_that_lies_gives_way_and_gives_no_byte(
    host: LazyHost, tmp_path: Path, origin: OriginServer
) -> None:
    """Any four bytes of its tables changed at random: the reader gets right bytes from elsewhere,
    or an error in time; never others, and never a crash."""
    packed = _qcow2(tmp_path)
    seed = random.SystemRandom().randrange(2**32)
    chance = random.Random(seed)
    print(f"seed {seed}")
    [l1_offset] = struct.unpack_from(">Q", packed, 40)
    [l2_entry] = struct.unpack_from(">Q", packed, l1_offset)
    l2_offset = l2_entry & 0x00FFFFFFFFFFFE00
    places = [*range(4, 112), *range(l1_offset, l1_offset + 8), *range(l2_offset, l2_offset + 64)]
    for number in range(8):
        lying = bytearray(packed)
        for place in chance.sample(places, 4):
            lying[place] = chance.randrange(256)
        good = origin.add(f"/good-{number}", packed)
        lie = origin.add(f"/lie-{number}", bytes(lying))
        identifier = _add(host, packed, lie, good)

        async def script(fetcher: ChunkFetcher, name: str = identifier) -> None:
            data = await host.images.reader(name).read(0, 2 * CHUNK_BYTES)
            assert data == IMAGE[: 2 * CHUNK_BYTES]

        host.run(script)
        host.images.remove(identifier)


@pytest.mark.parametrize("obstacle", ["backing", "data-file", "subclusters", "encrypted", "short"])
def test_a_file_that_needs_more_than_itself_is_not_read(
    host: LazyHost, tmp_path: Path, origin: OriginServer, obstacle: str
) -> None:
    """Files with obstacles give no chunk; the image is fetched whole then, or refused."""
    packed = bytearray(_qcow2(tmp_path))
    if obstacle == "backing":
        packed[8:20] = struct.pack(">QI", 0x200, 11)
        packed[0x200:0x20B] = b"/etc/passwd"
    if obstacle == "data-file":
        packed[79] |= 4
    if obstacle == "subclusters":
        packed[79] |= 16
    if obstacle == "encrypted":
        packed[32:36] = struct.pack(">I", 1)
    identifier = _add(host, bytes(packed), origin.add("/image", bytes(packed[:-1])))
    if obstacle != "short":
        origin.add("/image", bytes(packed))

    async def script(fetcher: ChunkFetcher) -> None:
        with pytest.raises(OriginFailed):
            await fetcher.fetch(identifier, 0, patient=False)

    host.run(script)

    assert [path for path in (host.state_dir / "chunks").rglob("*") if len(path.name) == 64] == []
