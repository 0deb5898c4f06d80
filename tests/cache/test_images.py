"""Published images: reading, sharing of chunks, removal, what a crash leaves."""

import gc
import hashlib
import os
import random
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from stratocache.cache.chunks import CHUNK_BYTES, ChunkStore
from stratocache.cache.errors import InvalidInput, NotFound, NotVerified
from stratocache.cache.images import ImageStore


def _data(seed: str, size: int) -> bytes:
    return hashlib.shake_128(seed.encode()).digest(size)


def _image(seed: str = "a") -> bytes:
    return _data(seed, 2 * CHUNK_BYTES) + bytes(CHUNK_BYTES) + _data(seed + "t", 70001)


def _publish(images: ImageStore, identifier: str, image: bytes) -> None:
    draft = images.begin()
    draft.add([image[start : start + CHUNK_BYTES] for start in range(0, len(image), CHUNK_BYTES)])
    images.publish(identifier, draft.manifest())
    images.finish(draft)


def _stored(state_dir: Path) -> set[str]:
    return {p.name for p in (state_dir / "chunks").rglob("*") if len(p.name) == 64}


def test_reads_at_any_place_and_length_equal_the_image(images: ImageStore) -> None:
    """Random reads, over chunk borders and past the end, give the image's bytes."""
    image = _image()
    _publish(images, "one", image)
    reader = images.reader("one")
    choice = random.Random(1)

    async def check() -> None:
        for _ in range(300):
            offset = choice.randrange(len(image) + 5000)
            size = choice.choice([1, 512, 4096, 131072, CHUNK_BYTES, 1024**2, len(image)])
            expected = image[offset : offset + size]
            assert await reader.read(offset, size) == expected
            assert reader.read_nowait(offset, size) == expected
            assert reader.read_blocking(offset, size) == expected

    trio.run(check)
    assert reader.size_bytes == len(image)


def test_nothing_is_read_before_it_is_verified(images: ImageStore, chunks: ChunkStore) -> None:
    """`read_nowait` answers only from chunks that this process has hashed, zeros at once."""
    image = _image()
    _publish(images, "one", image)
    reader = images.reader("one")

    assert reader.read_nowait(0, 4096) is None
    assert reader.read_nowait(2 * CHUNK_BYTES - 1, 2) is None
    assert reader.read_nowait(2 * CHUNK_BYTES, 4096) == bytes(4096)
    assert chunks.statistics().verified == 0
    trio.run(reader.read, 0, 4096)
    assert chunks.statistics().verified == 1
    assert reader.read_nowait(100, 4096) == image[100:4196]
    assert reader.read_nowait(CHUNK_BYTES - 1, 2) is None


def test_who_reads_in_order_is_read_ahead_of(
    images: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel is asked for each chunk once before one that reads in order comes to it, over chunks
    of zeros too, in small reads and in such over borders; for nothing when reads are scattered."""
    count = 14
    data = bytearray(_data("ahead", count * CHUNK_BYTES))
    data[4 * CHUNK_BYTES : 5 * CHUNK_BYTES] = bytes(CHUNK_BYTES)
    _publish(images, "one", bytes(data))
    asked: list[int] = []

    def advise(descriptor: int, *_: int) -> None:
        asked.append(descriptor)

    for size in (CHUNK_BYTES // 4, 2 * CHUNK_BYTES):
        reader = images.reader("one")
        assert reader.read_blocking(0, len(data)) == data
        descriptors = [reader.open_chunk(index) for index in range(count)]
        stored = {int(found): at for at, found in enumerate(descriptors) if found is not None}
        with monkeypatch.context() as patched:
            patched.setattr("os.posix_fadvise", advise)
            for offset in range(0, len(data), size):
                ahead = [stored[descriptor] for descriptor in asked]
                assert all(at in ahead for at in stored.values() if 1 < at < offset // CHUNK_BYTES)
                assert reader.read_nowait(offset, size) == data[offset : offset + size]
            assert sorted(stored[descriptor] for descriptor in asked) == [
                at for at in stored.values() if at > 1
            ]
            asked.clear()
            for index in (9, 3, 11, 6, 1, 12, 7):
                reader.read_nowait(index * CHUNK_BYTES, 4096)
            assert asked == []
        del reader


def test_a_chunk_that_many_wait_for_is_hashed_once(images: ImageStore, chunks: ChunkStore) -> None:
    """Twenty readers of one cold chunk cause one verification."""
    image = _image()
    _publish(images, "one", image)
    reader = images.reader("one")

    async def check() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(reader.read, 0, 4096)

    trio.run(check)
    assert chunks.statistics().verified == 1


def test_every_waiter_hears_of_a_corrupt_chunk(images: ImageStore, chunks: ChunkStore) -> None:
    """All readers of a damaged chunk get an error, none its bytes."""
    _publish(images, "one", _image())
    reader = images.reader("one")
    path = reader.chunk_path(0)
    assert path is not None
    os.truncate(path, 17)
    codes: list[str] = []

    async def read() -> None:
        with pytest.raises(NotVerified) as caught:
            await reader.read(0, 4096)
        codes.append(caught.value.code)

    async def check() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(read)

    trio.run(check)
    assert sorted(codes) == ["chunk-corrupt"] + ["chunk-missing"] * 4
    assert chunks.statistics().quarantined == 1


def test_the_parts_of_an_image_are_named(images: ImageStore) -> None:
    """Digests, files and descriptors of chunks; None for zeros; no index past the end."""
    image = _image()
    _publish(images, "one", image)
    reader = images.reader("one")

    assert reader.chunk(0) == hashlib.sha256(image[:CHUNK_BYTES]).digest()
    assert reader.chunk(2) is None
    assert reader.open_chunk(2) is None
    assert reader.chunk_path(2) is None
    path, descriptor = reader.chunk_path(3), reader.open_chunk(3)
    assert path is not None
    assert descriptor is not None
    assert path.read_bytes() == os.pread(descriptor, CHUNK_BYTES, 0) == image[3 * CHUNK_BYTES :]
    with pytest.raises(IndexError):
        reader.chunk(4)


def test_a_short_tail_of_zeros_reads_as_zeros(images: ImageStore, state_dir: Path) -> None:
    """An image that ends in less than a chunk of zeros stores nothing for it."""
    image = _data("a", CHUNK_BYTES) + bytes(5000)
    _publish(images, "one", image)

    assert len(_stored(state_dir)) == 1
    assert images.reader("one").read_blocking(0, 2 * CHUNK_BYTES) == image


def test_readers_are_shared_while_they_are_used(images: ImageStore) -> None:
    """Two who read one image hold one manifest."""
    _publish(images, "one", _image())
    first = images.reader("one")

    assert images.reader("one") is first
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None


def test_removal_keeps_chunks_that_another_image_uses(images: ImageStore, state_dir: Path) -> None:
    """Of two images with common chunks one can go and the other still reads."""
    first = _image("a")
    second = first[:CHUNK_BYTES] + _data("b", CHUNK_BYTES)
    _publish(images, "one", first)
    _publish(images, "two", second)
    assert len(_stored(state_dir)) == 4

    images.remove("one")

    assert images.identifiers() == ["two"]
    assert len(_stored(state_dir)) == 2
    assert images.reader("two").read_blocking(0, len(second)) == second
    with pytest.raises(NotFound) as caught:
        images.reader("one")
    assert caught.value.code == "image-not-found"
    images.remove("two")
    assert _stored(state_dir) == set()
    with pytest.raises(NotFound):
        images.remove("two")


def test_removal_of_several_takes_what_only_they_share(images: ImageStore, state_dir: Path) -> None:
    """Images that go together take the chunks that only they have in common; those of who stays stay,
    and one that is not there hinders nothing."""
    common, kept = _data("c", CHUNK_BYTES), _data("k", CHUNK_BYTES)
    _publish(images, "one", common + _data("1", CHUNK_BYTES))
    _publish(images, "two", common + kept)
    _publish(images, "three", kept)

    images.remove_all(["one", "never", "two"])

    assert images.identifiers() == ["three"]
    assert len(_stored(state_dir)) == 1
    assert images.reader("three").read_blocking(0, CHUNK_BYTES) == kept
    images.remove_all(["never"])


def test_an_abandoned_draft_leaves_only_what_others_use(
    images: ImageStore, state_dir: Path
) -> None:
    """Giving a draft up removes its own chunks and no published one's."""
    image = _image("a")
    _publish(images, "one", image)
    before = _stored(state_dir)

    draft = images.begin()
    draft.add([image[:CHUNK_BYTES]])
    draft.add([_data("new", CHUNK_BYTES)])
    assert len(_stored(state_dir)) == len(before) + 1
    images.abandon(draft)

    assert _stored(state_dir) == before


def test_a_draft_protects_its_chunks_from_removal(images: ImageStore, state_dir: Path) -> None:
    """An image removed while another with the same chunks is made takes none of them."""
    image = _image("a")
    _publish(images, "one", image)
    draft = images.begin()
    draft.add([image[:CHUNK_BYTES]])

    images.remove("one")
    images.publish("two", draft.manifest())
    images.finish(draft)

    assert images.reader("two").read_blocking(0, CHUNK_BYTES) == image[:CHUNK_BYTES]
    assert len(_stored(state_dir)) == 1


def test_removing_and_making_at_once_loses_no_chunk(images: ImageStore, state_dir: Path) -> None:
    """Images published while their twins are removed in another thread stay complete."""
    pieces = [_data(f"p{index}", CHUNK_BYTES) for index in range(6)]
    image = b"".join(pieces)
    _publish(images, "twin0", image)

    for round_ in range(1, 25):
        remover = threading.Thread(target=images.remove, args=(f"twin{round_ - 1}",))
        remover.start()
        _publish(images, f"twin{round_}", image)
        remover.join()
        for piece in pieces:
            path = images.chunks.path(hashlib.sha256(piece).digest())
            assert path.read_bytes() == piece

    assert images.identifiers() == ["twin24"]


def test_a_sweep_removes_what_a_crash_left(images: ImageStore, state_dir: Path) -> None:
    """Chunks of no image and half-written manifests go; images stay."""
    image = _image("a")
    _publish(images, "one", image)
    before = _stored(state_dir)
    other = ImageStore(state_dir, images.chunks)
    other.begin().add([_data("orphan", CHUNK_BYTES)])
    (state_dir / "manifests" / ".x.caibx.tmp").write_bytes(b"half")

    assert images.sweep() == 1

    assert _stored(state_dir) == before
    assert os.listdir(state_dir / "manifests") == ["one.caibx"]
    assert images.reader("one").read_blocking(0, len(image)) == image


def test_a_damaged_manifest_stops_the_removal_of_chunks(
    images: ImageStore, state_dir: Path
) -> None:
    """While it is unknown which chunks an image uses none is removed."""
    _publish(images, "one", _image("a"))
    _publish(images, "two", _image("b"))
    images.manifest_path("one").write_bytes(b"damaged")
    before = _stored(state_dir)

    images.remove("two")

    assert _stored(state_dir) == before
    with pytest.raises(NotVerified) as caught:
        images.reader("one")
    assert caught.value.code == "manifest-invalid"
    images.remove("one")
    assert images.sweep() == len(before)


@pytest.mark.parametrize("name", ["one", "two"])
@pytest.mark.parametrize("rot", [lambda path: path.write_bytes(b"damaged"), Path.unlink])
def test_what_a_removal_had_to_leave_goes_later(
    images: ImageStore, state_dir: Path, name: str, rot: Callable[[Path], object]
) -> None:
    """Chunks of an image that was removed while its manifest, or another's, was not whole are
    removed once all are; none goes before that is of an image whose manifest was lost."""
    kept = _image("a")
    _publish(images, "one", kept)
    needed, manifest = _stored(state_dir), images.manifest("one")
    _publish(images, "two", _image("b"))
    rot(images.manifest_path(name))

    images.remove_all(["two"])
    lost = set() if images.manifest_path("one").exists() else {"one"}
    images.remove_leftovers({"one"} & lost)

    assert _stored(state_dir) >= needed
    images.publish("one", manifest)
    if images.leftovers:
        images.remove_leftovers({"one"})
    assert _stored(state_dir) == needed
    assert not images.leftovers


def test_what_is_read_stays_though_its_manifest_is_lost(
    images: ImageStore, state_dir: Path
) -> None:
    """The removal of another image takes no chunk that a reader has, who knows them by heart."""
    image = _image("a")
    _publish(images, "one", image)
    _publish(images, "two", image)
    before = _stored(state_dir)
    reader = images.reader("one")
    images.manifest_path("one").unlink()

    images.remove("two")

    assert _stored(state_dir) == before
    assert reader.read_blocking(0, len(image)) == image


@pytest.mark.parametrize("identifier", ["", "..", "../x", "a/b", ".hidden", "a" * 65, "a\n", "é"])
def test_no_identifier_is_a_path(images: ImageStore, identifier: str) -> None:
    """Whatever could leave the directory is refused."""
    with pytest.raises(InvalidInput) as caught:
        images.manifest_path(identifier)

    assert caught.value.code == "identifier-invalid"
