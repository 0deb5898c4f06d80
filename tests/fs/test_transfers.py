"""What transfers leave behind, and the sparse files that they are made of."""

import errno
import os
import time
from collections.abc import Iterator
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.api_daemon import ROOT, Api
from support.appliance import small_filesystem
from support.contents import MIB, Contents, allocated_bytes

from stratocache.cache.configuration import Configuration, SpaceSettings
from stratocache.cache.errors import InvalidInput, NoSpace
from stratocache.fs import disk_intents, transfers
from stratocache.fs.content_upload import Part, Uploads
from stratocache.fs.records import DiskRequest
from stratocache.fs.sparse_file import BLOCK_BYTES, extents, write_sparse

OLD_S = 25 * 3600


@pytest.fixture
def contents(tmp_path: Path) -> Iterator[Contents]:
    """Raw disks with files, without an API."""
    (tmp_path / "state").mkdir()
    configuration = Configuration(
        state_dir=tmp_path / "state", run_dir=tmp_path / "run",
        space=SpaceSettings(reserve_bytes=0),
    )  # fmt: skip
    api = Api(configuration)
    yield Contents(configuration, api)
    api.db.close()


def names(contents: Contents) -> set[str]:
    """Return the names of what transfers have left."""
    return set(os.listdir(transfers.transfers_directory(contents.configuration)))


def test_sweep_keeps_what_goes_on(contents: Contents) -> None:
    """Old uploads, uploads and imports of disks that are gone, and conversions of dead processes
    are removed; the others stay."""
    disk, old = contents.add(MIB), contents.add(MIB)
    wanted = disk_intents.create_disk(contents.db, ROOT, DiskRequest(size_bytes=MIB)).subject
    directory = transfers.transfers_directory(contents.configuration)
    stay = {f"upload-{disk}", f"import-{wanted}", "download-young", "download-locked"}
    for name in {f"upload-{old}", "upload-gone", f"import-{disk}", "download-dead"} | stay:
        (directory / name).mkdir()
    before_s = time.time() - OLD_S
    for name in (f"upload-{old}", "download-dead", "download-locked"):
        os.utime(directory / name, (before_s, before_s))

    with transfers.claimed(directory / "download-locked") as ours:
        assert ours
        transfers.sweep(contents.configuration, contents.db)

    assert names(contents) == stay


def test_claim_is_exclusive(contents: Contents) -> None:
    """A directory is claimed once at a time, and not at all when it is not there."""
    directory = transfers.transfers_directory(contents.configuration) / "upload-x"
    with transfers.claimed(directory) as missing:
        directory.mkdir()
        with transfers.claimed(directory) as first, transfers.claimed(directory) as second:
            assert (missing, first, second) == (False, True, False)
    with transfers.claimed(directory) as again:
        assert again


@pytest.mark.root
def test_full_file_system_keeps_the_upload(tmp_path: Path) -> None:
    """An upload that meets a full file system fails, leaves the old content, and goes on once
    there is space."""
    with small_filesystem(tmp_path / "small", 8 * MIB) as state_dir:
        configuration = Configuration(
            state_dir=state_dir, run_dir=tmp_path / "run", space=SpaceSettings(reserve_bytes=0)
        )
        api = Api(configuration)
        contents = Contents(configuration, api)
        uuid = contents.add(4 * MIB, b"old")
        filler = state_dir / "filler"
        filler.write_bytes(bytes(5 * MIB))
        uploads = Uploads(configuration, api.db)
        part = Part("raw", 0, 0, 4 * MIB, 4 * MIB)
        with pytest.raises(NoSpace):
            uploads.receive(ROOT, uuid, part, BytesIO(b"x" * (4 * MIB)))
        assert contents.read(uuid).startswith(b"old")

        filler.unlink()
        there = uploads.find(ROOT, uuid).offset_bytes
        rest = Part("raw", there, there, 4 * MIB - there, 4 * MIB)
        done = uploads.receive(ROOT, uuid, rest, BytesIO(b"x" * (4 * MIB - there)))
        api.db.close()

        assert done.complete
        assert contents.read(uuid) == b"x" * (4 * MIB)


class Cut:
    """A body that ends in an error."""

    def __init__(self, data: bytes) -> None:
        self._stream = BytesIO(data)

    def read(self, size: int, /) -> bytes:
        """Return bytes, then fail as a socket does."""
        data = self._stream.read(size)
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "reset")
        return data


def test_stale_bytes_do_not_shine_through(contents: Contents) -> None:
    """Zeros that are sent where a part that did not count had data are zeros in the end."""
    uuid = contents.add(MIB)
    uploads = Uploads(contents.configuration, contents.db)
    proven = Part("raw", 0, 0, MIB, MIB, part_digests={"sha256": "0" * 64})
    with pytest.raises(InvalidInput, match="reset"):
        uploads.receive(ROOT, uuid, proven, Cut(b"stale" * 1000))
    assert uploads.find(ROOT, uuid).offset_bytes == 0
    first = Part("raw", 0, 0, 10, MIB)
    uploads.receive(ROOT, uuid, first, BytesIO(b"0123456789"))
    uploads.receive(ROOT, uuid, Part("raw", 10, MIB, 0, MIB), BytesIO())

    assert contents.read(uuid) == b"0123456789".ljust(MIB, b"\0")


_PIECES = st.lists(
    st.tuples(st.booleans(), st.integers(1, 3 * BLOCK_BYTES)), min_size=1, max_size=12
)


@settings(max_examples=100, deadline=None)
@given(pieces=_PIECES, cuts=st.lists(st.integers(0, 40000), max_size=4))
def test_sparse_writing_keeps_every_byte(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[bool, int]], cuts: list[int]
) -> None:
    """However bytes are cut into writes, the file has them, and no block of zeros is allocated."""
    content = b"".join((b"\1" if data else b"\0") * length for data, length in pieces)
    path = tmp_path_factory.getbasetemp() / "sparse"
    borders = sorted({0, len(content), *(cut for cut in cuts if cut < len(content))})
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.ftruncate(descriptor, len(content))
        for start, end in pairwise(borders):
            write_sparse(descriptor, content[start:end], start)
        os.fsync(descriptor)
        found = list(extents(descriptor, 0, len(content)))
    finally:
        os.close(descriptor)

    assert path.read_bytes() == content
    zero_blocks = sum(
        not content[start : start + BLOCK_BYTES].strip(b"\0")
        for start in range(0, len(content), BLOCK_BYTES)
    )
    blocks = -(-len(content) // BLOCK_BYTES)
    assert allocated_bytes(path) <= (blocks - zero_blocks) * BLOCK_BYTES
    assert [start for start, _, _ in found] == [0, *(end for _, end, _ in found[:-1])]
    assert found[-1][1] == len(content)
    assert not any(content[start:end].strip(b"\0") for start, end, data in found if not data)
