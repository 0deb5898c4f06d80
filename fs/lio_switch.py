"""Our targets of LIO, the kernel's own iSCSI target, as directories of configfs.

Standard library only and without rtslib, for the supervisor and the holder: they have to take guests
off the FUSE mount before its connection ends, or the kernel would pass the errors on to them, and
have to remove everything at a stop. `TARGETS.md`, "LIO".
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from stratocache.fs.target import IQN_PREFIX

CONFIGFS = Path("/sys/kernel/config")
CORE = CONFIGFS / "target" / "core"
ISCSI = CONFIGFS / "target" / "iscsi"
GROUP = "tpgt_1"
"""The only portal group of every target."""
BACKSTORE_PREFIX = "stratocache-"

_BEGIN_S = 10.0
_SUSPEND_S = 1.0
_FIRST_DESCRIPTOR = 3  # after the standard ones
_POLL_INTERVAL_S = 0.005


def groups() -> Iterator[Path]:
    """Yield the portal groups of our targets."""
    yield from sorted(ISCSI.glob(f"{IQN_PREFIX}*/{GROUP}"))


def backstores() -> Iterator[Path]:
    """Yield the directories of our files."""
    yield from sorted(CORE.glob(f"fileio_*/{BACKSTORE_PREFIX}*"))


def backing(group: Path) -> str | None:
    """Return the path of the file that a portal group exports, None when there is none."""
    for link in group.glob("lun/lun_*/*"):
        if link.is_symlink():
            return (link.resolve() / "udev_path").read_text().strip() or None
    return None


def suspend(folder: Path) -> "Suspension":
    """Close the sessions of all our targets on files below `folder` and let nobody in.

    Their initiators try again and again, as after a broken line. Closing a session waits for its
    commands, which may wait for what is about to end, but answers none of them any more: return a
    moment after all wait.
    """
    prefix = f"{folder}/"
    waiting = [
        _write_apart(group / "enable", "0")
        for group in groups()
        if (backing(group) or "").startswith(prefix)
    ]
    suspension = Suspension(waiting)
    suspension.begin(_BEGIN_S)
    suspension.wait(_SUSPEND_S)
    return suspension


class Suspension:
    """Processes that each disable one portal group."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids

    def begin(self, timeout_s: float) -> bool:
        """Return whether all have ended or wait in the kernel, which then has told the threads of
        their sessions to end; before that they answer."""
        return _poll(timeout_s, lambda: all(_waits(pid) for pid in self._running()))

    def wait(self, timeout_s: float) -> bool:
        """Return whether all have ended in time."""
        return _poll(timeout_s, lambda: not self._running())

    def _running(self) -> list[int]:
        self._pids = [pid for pid in self._pids if os.waitpid(pid, os.WNOHANG) == (0, 0)]
        return self._pids


def _poll(timeout_s: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_INTERVAL_S)
    return True


def _waits(pid: int) -> bool:
    """Whether a process that is not reaped yet waits and cannot be interrupted; see proc(5)."""
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state in ("D", "Z")


def remove_all() -> None:
    """Remove every target and file of ours; what is not ours stays. Raises `OSError`."""
    for group in groups():
        remove_group(group)
    for path in ISCSI.glob(f"{IQN_PREFIX}*"):
        path.rmdir()
    for path in backstores():
        remove_backstore(path)


def remove_group(group: Path) -> None:
    """Disconnect everybody, then remove a portal group and what is in it; raises `OSError`."""
    if (group / "enable").read_text().strip() == "1":
        (group / "enable").write_text("0")
    for acl in group.glob("acls/*"):
        for mapped in acl.glob("lun_*"):
            _remove_with_links(mapped)
        acl.rmdir()
    for lun in group.glob("lun/lun_*"):
        _remove_with_links(lun)
    for portal in group.glob("np/*"):
        portal.rmdir()
    group.rmdir()


def remove_backstore(path: Path) -> None:
    """Close a file that no logical unit refers to; raises `OSError`."""
    path.rmdir()
    with suppress(OSError):  # shared with a file of somebody else, strange as that is
        path.parent.rmdir()


def _remove_with_links(folder: Path) -> None:
    for link in folder.iterdir():
        if link.is_symlink():
            link.unlink()
    folder.rmdir()


def _write_apart(path: Path, text: str) -> int:
    """Write a file in a process of its own, which nobody waits for; return its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.set_wakeup_fd(-1)
        # it may have to wait for the end of the very FUSE connection that it would hold
        os.closerange(_FIRST_DESCRIPTOR, os.sysconf("SC_OPEN_MAX"))
        path.write_text(text)
    finally:
        os._exit(0)


if __name__ == "__main__":
    remove_all()
    sys.exit(0)
