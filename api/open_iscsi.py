"""The kernel initiator of this host (open-iscsi): log in to an attachment, find its device, log out.

The node record is made here instead of by discovery, which our targets refuse. The CHAP secret goes
into the record's file and onto no command line, where every user could read it. Waits and retries of
the record are such that a restart of ours is a pause: I/O is queued until the session is back.
"""

import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stratocache.cache.errors import Conflict, Internal, Refused, Unreachable

if TYPE_CHECKING:
    from stratocache.api.client import Document

_SYSTEM_PATH = "/usr/sbin:/sbin"
_RECORDS = (Path("/etc/iscsi/nodes"), Path("/var/lib/iscsi/nodes"))
_INITIATOR_NAME = Path("/etc/iscsi/initiatorname.iscsi")
_SESSIONS = Path("/sys/class/iscsi_session")
_LINKS = Path("/dev/disk/by-path")
_UDEV = Path("/run/udev/control")
_GROUP = 1
"""The target portal group of every target, tgt's and LIO's."""
_COMMAND_TIMEOUT_S = 120.0
_DEVICE_TIMEOUT_S = 30.0
_POLL_INTERVAL_S = 0.05
_REQUEST_TIMEOUT_S = 300
"""How long the kernel waits for one request before it resets the device; a write may wait for
space, or for a `blockd` that starts."""

# Exit statuses of iscsiadm(8).
_NO_SESSION = 2
_LOGIN_REFUSED = 24
_NO_DAEMON = (12, 20)
_SESSION_EXISTS = 15
_NOTHING_FOUND = 21

_SETTINGS = {
    "node.startup": "manual",
    "node.conn[0].startup": "manual",
    # queued as long as the session is away, however long
    "node.session.timeo.replacement_timeout": "-1",
    "node.session.initial_login_retry_max": "4",
    "node.session.auth.authmethod": "CHAP",
}


@dataclass(frozen=True, slots=True)
class Device:
    """A logical unit as this host has it."""

    path: str
    """The name that stays: below /dev/disk/by-path where udev makes one, else the kernel's."""
    kernel_path: str
    """Such as /dev/sdb."""


@dataclass(frozen=True, slots=True)
class Node:
    """One attachment's target, as open-iscsi calls what it may log in to."""

    iqn: str
    address: str
    port: int
    lun: int

    @classmethod
    def of(cls, attachment: "Document") -> "Node":
        """Return the node of an attachment, as the API shows it."""
        address, _, port = attachment["portal"].rpartition(":")
        # where a daemon listens everywhere, this host reaches it on its loopback
        address = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(address, address)  # nosec B104 # nothing is bound here
        return cls(attachment["target_iqn"], address, int(port), attachment["lun"])

    def log_in(self, username: str, secret: str) -> Device:
        """Log in unless that is done, and return the device when it is there.

        Raises `Unreachable` (`open-iscsi-missing`, `iscsid-not-running`), `Refused`
        (`login-refused`), `Internal`; then no session and no record of it stay.
        """
        if self._session() is None:
            try:
                self._write_record(username, secret)
                self._iscsiadm("--login", accept=(_SESSION_EXISTS,))
                return self._wait_for_device()
            except BaseException:
                self.log_out()
                raise
        return self._wait_for_device()

    def log_out(self) -> None:
        """Log out and forget the node; nothing to do is fine.

        Raises `Conflict` (`device-in-use`) while something of this host uses the device, and
        `Unreachable` and `Internal` as `log_in`.
        """
        session = self._session()
        if session is not None:
            for disk in self._disks(session):
                _check_unused(disk)
            self._iscsiadm("--logout", accept=(_NO_SESSION, _NOTHING_FOUND))
        self._iscsiadm("-o", "delete", accept=(_NOTHING_FOUND,))

    # -- steps

    def _iscsiadm(self, *arguments: str, accept: tuple[int, ...] = ()) -> None:
        program = shutil.which("iscsiadm", path=f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}")
        if program is None:
            raise Unreachable(
                "open-iscsi-missing", "iscsiadm is not on PATH; install the package open-iscsi."
            )
        portal = f"{self.address}:{self.port},{_GROUP}"
        done = subprocess.run(
            [program, "-m", "node", "-T", self.iqn, "-p", portal, *arguments],
            check=False, capture_output=True, text=True, errors="replace",
            stdin=subprocess.DEVNULL, timeout=_COMMAND_TIMEOUT_S,
        )  # fmt: skip
        if done.returncode in (0, *accept):
            return
        if done.returncode in _NO_DAEMON:
            raise Unreachable(
                "iscsid-not-running",
                "iscsid, the daemon of open-iscsi, does not run; start it "
                "(systemctl start iscsid) and try again.",
            )
        if done.returncode == _LOGIN_REFUSED:
            raise Refused(
                "login-refused",
                f"{self.iqn} does not let this host's initiator in; compare the attachment's "
                f"initiator with {_INITIATOR_NAME}.",
            )
        raise Internal(
            "open-iscsi-failed",
            f"iscsiadm failed with status {done.returncode}: {_last_line(done.stderr)}",
        )

    def _write_record(self, username: str, secret: str) -> None:
        """Make the node's record with our settings, in place of one that is there."""
        self._iscsiadm("-o", "new")
        found = [path for root in _RECORDS for path in (root / self.iqn).rglob("*")]
        records = [path for path in found if path.is_file()]
        if not records:
            raise Internal(
                "open-iscsi-failed",
                f"iscsiadm left no record of {self.iqn} below {_RECORDS[0]} or {_RECORDS[1]}.",
            )
        settings = {
            **_SETTINGS,
            "node.session.auth.username": username,
            "node.session.auth.password": secret,
        }
        for record in records:
            _change_record(record, settings)

    def _session(self) -> Path | None:
        """Return the session in sysfs, None when nobody is logged in."""
        for session in _SESSIONS.glob("session*"):
            if _read(session / "targetname") == self.iqn:
                return session
        return None

    def _disks(self, session: Path) -> list[Path]:
        """Return the folders of a session's disks, as `…/block/sdb`."""
        return sorted(session.glob(f"device/target*/*:*:*:{self.lun}/block/sd*"))

    def _wait_for_device(self) -> Device:
        deadline = time.monotonic() + _DEVICE_TIMEOUT_S
        while True:
            session = self._session()
            disks = [] if session is None else self._disks(session)
            late = time.monotonic() > deadline
            if disks:
                kernel_path = Path("/dev") / disks[0].name
                link = self._link_to(kernel_path)
                if link is not None or not _UDEV.exists() or late:
                    (disks[0] / "device/timeout").write_text(str(_REQUEST_TIMEOUT_S))
                    return Device(str(link or kernel_path), str(kernel_path))
            if late:
                raise Internal(
                    "device-missing",
                    f"The kernel made no disk of {self.iqn} within {_DEVICE_TIMEOUT_S:g} s; its "
                    "log may say why.",
                )
            time.sleep(_POLL_INTERVAL_S)

    def _link_to(self, device: Path) -> Path | None:
        for link in _LINKS.glob(f"ip-*-iscsi-{self.iqn}-lun-{self.lun}"):
            if link.resolve() == device:
                return link
        return None


def initiator_name() -> str | None:
    """Return this host's initiator name, None when it has none."""
    found = re.search(r"^InitiatorName=(\S+)", _read(_INITIATOR_NAME), re.MULTILINE)
    return found[1] if found else None


def shown(attachment: "Document", device: Device) -> dict[str, Any]:
    """Return what an attachment with a device of this host is shown as: nobody needs the secret."""
    needless = ("chap", "iscsi_url", "libvirt_xml", "qemu_args")
    kept = {name: value for name, value in attachment.items() if name not in needless}
    return {**kept, "device": device.path, "kernel_device": device.kernel_path}


def _change_record(record: Path, settings: dict[str, str]) -> None:
    lines = [
        line
        for line in record.read_text().splitlines()
        if line.partition(" = ")[0] not in settings and line != "# END RECORD"
    ]
    lines += [f"{name} = {value}" for name, value in settings.items()]
    # Outside the folder, where every file is a record.
    partial = record.parent.parent.parent / f".stratocache-{os.getpid()}"
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        os.fchmod(descriptor, 0o600)
        file.write("\n".join([*lines, "# END RECORD", ""]))
        file.flush()
        os.fsync(descriptor)
    partial.rename(record)


def _check_unused(disk: Path) -> None:
    """Refuse to take away what is mounted, swapped on, or below another device."""
    parts = [disk, *disk.glob(f"{disk.name}*")]
    numbers = {_read(part / "dev") for part in parts}
    mounted = {line.split()[2] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    swaps = {line.split()[0] for line in Path("/proc/swaps").read_text().splitlines()[1:]}
    held = any(any((part / "holders").iterdir()) for part in parts)
    if held or numbers & mounted or swaps & {f"/dev/{part.name}" for part in parts}:
        raise Conflict(
            "device-in-use",
            f"/dev/{disk.name} is still mounted or used by another device of this host; "
            "unmount it and try again.",
        )


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]
