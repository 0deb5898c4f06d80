"""Many files made durable at once."""

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from stratocache.fs.group_sync import sync_all

MANY = 300
NOBODY = 1_000_000
"""A descriptor that is not open."""


@pytest.fixture
def descriptors(tmp_path: Path) -> Iterator[list[int]]:
    """Many files that were written, and their directory."""
    with ExitStack() as opened:
        found = []
        for number in range(MANY):
            found.append(os.open(tmp_path / str(number), os.O_RDWR | os.O_CREAT))
            opened.callback(os.close, found[-1])
            os.write(found[-1], b"x" * 5000)
        found.append(os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY))
        opened.callback(os.close, found[-1])
        yield found


def test_files_and_directories_are_synced(descriptors: list[int]) -> None:
    """However many there are, each has its answer."""
    assert sync_all(descriptors) == [None] * (MANY + 1)
    assert sync_all(descriptors[:1]) == [None]
    assert sync_all([]) == []


def test_one_that_cannot_be_synced_is_named(descriptors: list[int]) -> None:
    """A descriptor of nothing, or of what has no medium, has its own error; the others are synced."""
    reader, writer = os.pipe()
    try:
        outcomes = sync_all([*descriptors[:3], NOBODY, *descriptors[3:6], reader, descriptors[6]])
    finally:
        os.close(reader)
        os.close(writer)
    assert [None if error is None else error.errno for error in outcomes] == [
        None, None, None, errno.EBADF, None, None, None, errno.EINVAL, None,
    ]  # fmt: skip


def test_threads_do_not_mix_their_answers(descriptors: list[int]) -> None:
    """What one thread asks for is answered to it."""
    with ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(sync_all, [*descriptors[:n], *([NOBODY] if n % 2 else [])])
            for n in range(2, 40)
        ]
        for n, future in zip(range(2, 40), asked, strict=True):
            errors = [None if error is None else error.errno for error in future.result()]
            assert errors == [None] * n + ([errno.EBADF] if n % 2 else [])
