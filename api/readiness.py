"""Whether the parts that requests need answer: state, `blockd`, its mount, the iSCSI portal."""

import socket
import sqlite3
from pathlib import Path

from stratocache.cache.configuration import Configuration
from stratocache.fs.run_directory import RunDirectory
from stratocache.fs.schema import MIGRATIONS
from stratocache.fs.state import Database
from stratocache.fs.supervisor_status import read_status

_CONNECT_TIMEOUT_S = 1.0
_MOUNT_TABLE = Path("/proc/self/mountinfo")
_ESCAPES = {" ": r"\040", "\t": r"\011", "\n": r"\012", "\\": r"\134"}  # proc(5)


def faults(configuration: Configuration, db: Database) -> dict[str, str]:
    """Return a sentence for each part that does not work."""
    return {part: sentence for part, sentence in parts(configuration, db).items() if sentence}


def parts(configuration: Configuration, db: Database) -> dict[str, str]:
    """Return what is wrong with each part, empty when it works: `state`, `supervisor`, `blockd`,
    `mount`, `portal`."""
    return {
        "state": _state_fault(db),
        "supervisor": _supervisor_fault(configuration.run_dir),
        "blockd": _blockd_fault(configuration.poke_socket),
        "mount": _mount_fault(configuration.blocks),
        "portal": _portal_fault(configuration),
    }


def _state_fault(db: Database) -> str:
    try:
        row = db.row("PRAGMA user_version")
    except sqlite3.Error as error:
        return f"The state database does not open ({error})."
    assert row is not None
    if row[0] != len(MIGRATIONS):
        return f"The state database has schema {row[0]}, this version needs {len(MIGRATIONS)}."
    return ""


def _supervisor_fault(run_dir: Path) -> str:
    status = read_status(RunDirectory(run_dir).supervisor_status)
    return status.fault if status is not None else ""


def _blockd_fault(path: Path) -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(str(path))
        except OSError as error:
            return f"blockd does not listen on {path} ({error.strerror or error})."
    return ""


def _lio_fault(path: Path) -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(str(path))
        except OSError as error:
            return f"The LIO process does not listen on {path} ({error.strerror or error})."
    return ""


def _mount_fault(path: Path) -> str:
    point = "".join(_ESCAPES.get(letter, letter) for letter in str(path))
    for line in _MOUNT_TABLE.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        if line.split(" ")[4] == point:
            return ""
    return f"The FUSE tree is not mounted on {path}."


def _portal_fault(configuration: Configuration) -> str:
    address, port = configuration.iscsi.address, configuration.iscsi.port
    if configuration.iscsi.backend == "lio":  # the kernel listens only while there is a target
        return _lio_fault(RunDirectory(configuration.run_dir).lio_control)
    try:
        with socket.create_connection((address, port), timeout=_CONNECT_TIMEOUT_S):
            return ""
    except OSError as error:
        return f"The iSCSI portal {address}:{port} does not answer ({error.strerror or error})."
