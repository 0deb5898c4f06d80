"""One child of the supervisor: whose fault its end was."""

import signal
import sys
import time

import pytest

from stratocache.fs import processes
from stratocache.fs.processes import Child, Launch

LASTING = Launch([sys.executable, "-c", "import time; time.sleep(100)"])
FAILING = Launch([sys.executable, "-c", "exit(3)"])
ABORTING = Launch([sys.executable, "-c", "import os; os.abort()"])


def end(child: Child, launch: Launch, number: signal.Signals | None = None) -> None:
    """Start a process and collect it, killed by a signal if one is given."""
    child.start(launch)
    if number is not None:
        child.send(number)
    assert child.wait(20)
    child.collect()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_process_is_not_at_fault(number: signal.Signals) -> None:
    """However often somebody kills it, that is no crash, and the next start is not far."""
    child = Child("child")
    for _ in range(12):
        end(child, LASTING, number)

    assert child.crashes == 0
    assert child.due_at - time.monotonic() <= processes.DELAY_MAX_S


def test_crashes_are_counted_until_it_was_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends by a status or a signal of its own count, kills between them do not, and one that was
    ready for long begins the count anew."""
    child = Child("child")
    end(child, FAILING)
    end(child, ABORTING)
    end(child, LASTING, signal.SIGKILL)
    assert child.crashes == 2

    monkeypatch.setattr(processes, "STEADY_AFTER_S", 0.0)
    child.start(FAILING)
    child.mark_ready()
    assert child.wait(20)
    child.collect()
    assert child.crashes == 1


def test_pauses_are_from_the_end_to_the_next_that_is_ready() -> None:
    """A start that fails between is part of the pause; a hand-over keeps what was counted."""
    child = Child("child")
    child.start(LASTING)
    child.mark_ready()
    assert (child.pause_s, child.paused_s) == (0, 0)
    child.send(signal.SIGKILL)
    assert child.wait(20)
    child.collect()
    ended = time.monotonic()
    end(child, FAILING)
    child.start(LASTING)
    child.mark_ready()
    assert 0 < child.pause_s <= time.monotonic() - ended + 0.1
    first = child.pause_s
    child.send(signal.SIGKILL)
    assert child.wait(20)
    child.collect()
    child.start(LASTING)
    child.mark_ready()

    handed = child.handed_over()
    child.stop(signal.SIGKILL, 20)

    assert handed["paused_s"] == child.paused_s == pytest.approx(first + child.pause_s)
