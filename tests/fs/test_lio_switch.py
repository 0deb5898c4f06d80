"""What is known of LIO's switches without LIO; the rest is in `tests/vm/test_lio.py`."""

import subprocess
from collections.abc import Iterator

import pytest

from stratocache.fs.lio_switch import Suspension


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits, but could be interrupted: it has not told the kernel anything."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def test_suspension_begins_with_the_last_who_carries_it_out(
    sleeper: subprocess.Popen[bytes],
) -> None:
    """However slow the host is, a suspension has not begun while somebody has still to ask for it."""
    done = subprocess.Popen(["true"])
    suspension = Suspension([done.pid, sleeper.pid])
    assert not suspension.begin(0.3)
    assert not suspension.wait(0.0)
    sleeper.kill()
    assert suspension.begin(20)
    assert suspension.wait(20)
    done.returncode = sleeper.returncode = 0  # both were reaped
