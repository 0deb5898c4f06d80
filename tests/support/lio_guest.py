"""LIO in a kernel guest: what is called there (`support.guest_agent`), and the host's view of it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

import trio

from stratocache.cache.errors import Unreachable
from stratocache.fs import lio_switch
from stratocache.fs.lio import Lio
from stratocache.fs.target import ActualTarget, Session, Target, iqn_of, serial_of
from support.iscsi import Initiator
from support.kernel_guest import DATA, KernelGuest

CONTROL = Path("/run/lio.sock")
PORT = 3260
MIB = 1024**2
UUIDS = (
    "3f2504e0-4f89-41d3-9a0c-0305e82c3301",
    "7c9e6679-7425-40de-944b-e07fc1f90ae7",
    "16fd2706-8baf-433b-82eb-8c7fada847da",
)
_START_TIMEOUT_S = 60.0
_FOREIGN = "iqn.2026-11.org.example:foreign"
_BARE = "iqn.2026-11.org.example:bare"
_P = ParamSpec("_P")
_T = TypeVar("_T")


# -- called in the guest


def start_server() -> int:
    """Start the process that makes targets; return its id when it listens."""
    with open("/run/lio.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "stratocache.fs.lio_server", "--control", str(CONTROL),
             "--address", "0.0.0.0", "--port", str(PORT)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not _listens():
        assert process.poll() is None, Path("/run/lio.log").read_text()
        assert time.monotonic() < deadline, "the LIO process does not start"
        time.sleep(0.05)
    return process.pid


def _listens() -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(CONTROL))
        except OSError:
            return False
    return True


def kill_server(pid: int) -> None:
    """Kill the process; nobody answers then."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    try:
        list_targets()
    except Unreachable:
        return
    raise AssertionError("somebody answers for a dead process")


def create(target: Target) -> None:
    """Make a target."""
    trio.run(Lio(CONTROL).create, target)


def remove(number: int) -> None:
    """Remove a target."""
    trio.run(Lio(CONTROL).remove, number)


def list_targets() -> dict[int, ActualTarget]:
    """List targets."""
    return trio.run(Lio(CONTROL).list)


def sessions(number: int) -> tuple[Session, ...]:
    """Return who is logged in."""
    return trio.run(Lio(CONTROL).sessions, number)


def make_file(path: Path, size_bytes: int, fill: int | None = None) -> None:
    """Make a disk file, sparse or full of one byte."""
    with path.open("wb") as file:
        if fill is not None:
            file.write(bytes([fill]) * size_bytes)
        file.truncate(size_bytes)


def content(path: Path, offset: int, size_bytes: int) -> bytes:
    """Return a part of a file."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size_bytes)


def allocated_bytes(path: Path) -> int:
    """Return what a file takes."""
    return path.stat().st_blocks * 512


def backstores() -> list[Path]:
    """Return the directories of our files in configfs."""
    return list(lio_switch.backstores())


def suspend(folder: Path) -> None:
    """Suspend the targets on files of a folder, and wait until it is done."""
    assert lio_switch.suspend(folder).wait(_START_TIMEOUT_S)


def write_text(path: Path, text: str) -> None:
    """Write a file of configfs."""
    path.write_text(text)


def read_text(path: Path) -> str:
    """Read a file of configfs."""
    return path.read_text().strip()


def make_foreign_target() -> None:
    """Make a target as another program of the host would."""
    folder = lio_switch.ISCSI / _FOREIGN / lio_switch.GROUP / "lun/lun_1"
    file = lio_switch.CORE / "fileio_5" / "others"
    file.mkdir(parents=True)
    make_file(DATA / "foreign", MIB)
    (file / "control").write_text(f"fd_dev_name={DATA / 'foreign'},fd_dev_size={MIB}\n")
    (file / "enable").write_text("1\n")
    folder.mkdir(parents=True)
    (folder / "disk").symlink_to(file)


def export_bare(number: int, size_bytes: int, *, thin: bool) -> str:
    """Export a new file by the kernel's own means, open to everybody; return the target's name."""
    iqn = f"{_BARE}{number}"
    file = lio_switch.CORE / f"fileio_{number}" / "bare"
    file.mkdir(parents=True)
    make_file(DATA / f"bare{number}", size_bytes)
    (file / "control").write_text(
        f"fd_dev_name={DATA / f'bare{number}'},fd_dev_size={size_bytes},fd_buffered_io=1\n"
    )
    (file / "enable").write_text("1\n")
    group = lio_switch.ISCSI / iqn / lio_switch.GROUP
    (group / "lun/lun_1").mkdir(parents=True)
    (group / "lun/lun_1/disk").symlink_to(file)
    settings = {
        file / "attrib/emulate_tpu": int(thin),
        file / "attrib/emulate_tpws": int(thin),
        group / "attrib/authentication": 0,
        group / "attrib/generate_node_acls": 1,
        group / "attrib/demo_mode_write_protect": 0,
    }
    for path, value in settings.items():
        path.write_text(f"{value}\n")
    (group / "np" / f"0.0.0.0:{PORT}").mkdir()
    (group / "enable").write_text("1\n")
    return iqn


def foreign_target_lives() -> bool:
    """Whether that target and its file are as they were made."""
    link = lio_switch.ISCSI / _FOREIGN / lio_switch.GROUP / "lun/lun_1/disk"
    return link.is_symlink() and (lio_switch.CORE / "fileio_5/others/enable").read_text()[0] == "1"


def remove_foreign_target() -> None:
    """Take it away again."""
    lio_switch.remove_group(lio_switch.ISCSI / _FOREIGN / lio_switch.GROUP)
    (lio_switch.ISCSI / _FOREIGN).rmdir()
    lio_switch.remove_backstore(lio_switch.CORE / "fileio_5/others")


# -- called on the host


@dataclass
class LioBench:
    """The guest's LIO and how this machine reaches it."""

    guest: KernelGuest

    def call(self, function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
        """Call a function above in the guest."""
        return self.guest.call(function, *arguments, **named)

    def target(self, number: int = 1, *, fill: int | None = None) -> Target:
        """Return a target on a new file of the guest."""
        file = DATA / f"lio{number}"
        self.call(make_file, file, 8 * MIB, fill)
        return Target(
            number=number,
            iqn=iqn_of(UUIDS[number % len(UUIDS)] + str(number)),
            backing=file,
            read_only=False,
            serial=serial_of(UUIDS[number % len(UUIDS)]),
            chap_username=f"user{number}",
            chap_secret=f"secret-number-{number}",
        )

    def create(self, target: Target) -> Initiator:
        """Make a target and return an initiator that may log in."""
        self.call(create, target)
        port = self.guest.port(PORT)
        return Initiator(port, target.iqn, target.chap_username, target.chap_secret)
