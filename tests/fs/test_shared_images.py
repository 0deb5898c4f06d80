"""What other hosts may have: chunks and manifests of catalogues' images, never what was written here."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.lazy import entry_of, index_of, manifest_of, some_image
from support.peer_hosts import PeerHost, Site

from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.entry import LOCAL_CATALOGUE, EndorsedIndex
from stratocache.cache.errors import NotFound
from stratocache.fs.shared_images import SharedImages

IMAGE = some_image(4, tail_bytes=5000)
PRIVATE = IMAGE[: 2 * CHUNK_BYTES] + hashlib.shake_128(b"private").digest(2 * CHUNK_BYTES)
LOCATION = "http://192.0.2.1/image"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[PeerHost]:
    """A state directory."""
    host = PeerHost(tmp_path / "host", Site(tmp_path / "site").settings())
    yield host
    host.close()


@pytest.fixture
def shared(host: PeerHost) -> SharedImages:
    """What it shares."""
    return SharedImages(host.configuration, host.db)


def _code(call: object, *arguments: object) -> str:
    assert callable(call)
    with pytest.raises(NotFound) as raised:
        call(*arguments)
    return raised.value.code


def test_images_of_catalogues_are_shared(host: PeerHost, shared: SharedImages) -> None:
    """The manifest and each chunk of a verified image are given, whether or not it is named."""
    entry = entry_of(IMAGE, LOCATION)
    host.add(IMAGE, entry)
    manifest = manifest_of(IMAGE)

    assert shared.manifest(entry.identifier) == manifest.to_bytes()
    for index in range(manifest.chunk_count):
        data = IMAGE[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
        assert shared.chunk(manifest.digest(index), entry.identifier) == data
        assert shared.chunk(manifest.digest(index), None) == data


def test_what_was_written_here_stays_here(host: PeerHost, shared: SharedImages) -> None:
    """Of an image that was saved here, and of what no image has, neither manifest nor chunks are
    given, though their digests are named; chunks that a catalogue's image has too are."""
    private = entry_of(PRIVATE, catalogue=LOCAL_CATALOGUE)
    host.add(PRIVATE, private)
    snapshot = hashlib.shake_128(b"snapshot").digest(CHUNK_BYTES)
    host.chunks.put(hashlib.sha256(snapshot).digest(), snapshot)
    manifest = manifest_of(PRIVATE)

    assert _code(shared.manifest, private.identifier) == "image-unknown"
    for digest in (manifest.digest(0), manifest.digest(3), hashlib.sha256(snapshot).digest()):
        assert _code(shared.chunk, digest, None) == "chunk-unknown"
        assert _code(shared.chunk, digest, private.identifier) == "image-unknown"
    public = entry_of(IMAGE, LOCATION)
    host.add(IMAGE, public)
    assert shared.chunk(manifest.digest(0), None) == PRIVATE[:CHUNK_BYTES]
    assert _code(shared.chunk, manifest.digest(3), None) == "chunk-unknown"
    assert _code(shared.chunk, manifest.digest(3), public.identifier) == "chunk-unknown"


@pytest.mark.parametrize("state", ["fetching", "rejected", "withdrawn", "deleting"])
def test_only_what_may_be_read_is_shared(host: PeerHost, shared: SharedImages, state: str) -> None:
    """Of an image that nobody may clone here, nothing is given."""
    entry = entry_of(IMAGE, LOCATION)
    host.add(IMAGE, entry, state=state)

    assert _code(shared.manifest, entry.identifier) == "image-unknown"
    assert _code(shared.chunk, manifest_of(IMAGE).digest(0), entry.identifier) == "image-unknown"
    assert _code(shared.chunk, manifest_of(IMAGE).digest(0), None) == "chunk-unknown"


def test_a_manifest_that_nothing_proves_yet_is_not_given(
    tmp_path: Path, host: PeerHost, shared: SharedImages
) -> None:
    """Of an image that is not complete the chunks are given that are here, and its manifest only if
    it is the one that was endorsed."""
    bare = entry_of(IMAGE, LOCATION)
    host.add(IMAGE, bare, state="provisional")
    content = index_of(IMAGE, tmp_path)
    index = EndorsedIndex(url=f"{LOCATION}.caibx", sha256=hashlib.sha256(content).hexdigest())

    assert _code(shared.manifest, bare.identifier) == "image-unknown"
    assert shared.chunk(manifest_of(IMAGE).digest(0), bare.identifier) == IMAGE[:CHUNK_BYTES]
    host.db.connection.execute("DELETE FROM images")
    host.insert(entry_of(IMAGE, LOCATION, index=index), "provisional")
    assert shared.manifest(bare.identifier) == content


def test_rot_is_not_given_away(host: PeerHost, shared: SharedImages) -> None:
    """A chunk or manifest whose file is damaged counts as one that is not here, each time until it
    is whole again."""
    entry = entry_of(IMAGE, LOCATION)
    host.add(IMAGE, entry)
    digest = manifest_of(IMAGE).digest(1)
    chunk = host.chunks.path(digest)
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-1] + b"x")
    assert _code(shared.chunk, digest, entry.identifier) == "chunk-unknown"
    chunk.write_bytes(whole)
    assert shared.chunk(digest, entry.identifier) == whole

    path = host.images.manifest_path(entry.identifier)
    content = path.read_bytes()
    exchanged = content[:104] + content[144:184] + content[144:]
    path.write_bytes(exchanged)
    assert _code(shared.manifest, entry.identifier) == "image-unknown"
    path.write_bytes(content)
    assert shared.manifest(entry.identifier) == content
