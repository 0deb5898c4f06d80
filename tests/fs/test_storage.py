"""Files of the operating system, as disks use them."""

import errno
import os
from pathlib import Path

import pytest

from stratocache.fs.content_source import FileSource
from stratocache.fs.storage import OpenFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give a small file."""
    made = tmp_path / "data"
    made.write_bytes(b"x" * 512)
    return made


def test_closing_twice_leaves_the_next_file_of_that_number_open(
    path: Path, closed_twice: list[str]
) -> None:
    """A second close is EBADF, and a file that has got the number since can still be read."""
    file = OpenFile(os.open(path, os.O_RDWR))
    source = FileSource(path, 512)
    file.close()
    source.close()
    others = [os.open(path, os.O_RDONLY) for _ in range(8)]
    for closed in (file, source):
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            closed.close()
    assert len(closed_twice) == 2
    closed_twice.clear()
    for other in others:
        assert os.pread(other, 1, 0) == b"x"
        os.close(other)


def test_closed_file_writes_nowhere(path: Path) -> None:
    """A write after the close is EBADF, whoever has the number of the descriptor by then."""
    file = OpenFile(os.open(path, os.O_RDWR))
    file.close()
    others = [os.open(path, os.O_RDWR) for _ in range(8)]
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        file.pwrite(b"y", 0)
    assert path.read_bytes() == b"x" * 512
    for other in others:
        os.close(other)
