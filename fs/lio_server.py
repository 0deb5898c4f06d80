"""The process that makes and removes LIO's targets: rtslib behind a Unix socket.

    python -m stratocache.fs.lio_server --control SOCKET --address ADDRESS --port PORT

It stands where tgtd stands with the other back end, but serves nobody's blocks: that is the kernel,
which goes on whatever becomes of this process. It is not a part of `blockd`, as it opens files of
the FUSE mount, and a `blockd` that waits for itself could not even be killed.

A connection carries one request and one answer, each one line of JSON (`stratocache.fs.lio`).
Nothing is remembered here: configfs is what there is.
"""

import argparse
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rtslib_fb as rtslib

from stratocache.cache.errors import Conflict, Internal, StratocacheError
from stratocache.fs import lio_switch
from stratocache.fs.lio_switch import BACKSTORE_PREFIX, CONFIGFS, CORE, GROUP, ISCSI
from stratocache.fs.target import IQN_PREFIX, LUN, ActualTarget, Session, Target

log = logging.getLogger(__name__)

# rtslib numbers backstores from 0; attachments are numbered for good, so that both never meet.
_INDEX_BASE = 1 << 24
_DATABASE = Path("/etc/target")
_MODULES = ("configfs", "target_core_mod", "target_core_file", "iscsi_target_mod")
_REQUEST_BYTES_MAX = 64 * 1024
_BUSY_TIMEOUT_S = 10.0
_BACKLOG = 64
_WORKERS_MAX = 64
_OPEN_PROTECT = "attrib/demo_mode_write_protect"


def prepare() -> None:
    """Load what the kernel needs and make the folder that rtslib insists on.

    Raises `Internal` (`lio-missing`) with the way to mend it.
    """
    for module in _MODULES:
        if not (Path("/sys/module") / module).exists():
            subprocess.run(["modprobe", "-q", module], check=False)
    if not os.path.ismount(CONFIGFS):
        subprocess.run(["mount", "-t", "configfs", "configfs", str(CONFIGFS)], check=False)
    if not CORE.parent.is_dir():
        raise Internal(
            "lio-missing",
            "This kernel has no LIO (modules target_core_mod and iscsi_target_mod); "
            'set iscsi.backend = "tgt".',
        )
    _DATABASE.mkdir(mode=0o700, exist_ok=True)
    with suppress(OSError):  # as rtslib would, which is too late then; refused once files are open
        (CORE.parent / "dbroot").write_text(f"{_DATABASE}\n")
    ISCSI.mkdir(exist_ok=True)


def targets() -> Iterator[ActualTarget]:
    """Yield our targets, complete or not.

    The number is the file's; a target without one, which nobody but others can leave, gets a
    negative number of its own.
    """
    files = {path.name.removeprefix(BACKSTORE_PREFIX): path for path in lio_switch.backstores()}
    folders = {path.name.removeprefix(IQN_PREFIX): path for path in ISCSI.glob(f"{IQN_PREFIX}*")}
    for name in sorted(files.keys() | folders.keys()):
        yield _actual(name, files.get(name), folders.get(name, ISCSI / (IQN_PREFIX + name)) / GROUP)


def _actual(name: str, file: Path | None, group: Path) -> ActualTarget:
    number = -1 - zlib.crc32(name.encode())
    backing, serial, online = None, "", False
    if file is not None:
        number = int(file.parent.name.rpartition("_")[2]) - _INDEX_BASE
        online = _read(file / "enable") == "1"
        if online:
            backing = _read(file / "udev_path") or None
            serial = _read(file / "wwn/vpd_unit_serial").partition(":")[2].strip()
    luns = tuple(int(path.name.removeprefix("lun_")) for path in sorted(group.glob("lun/lun_*")))
    linked = any(path.is_symlink() for path in group.glob("lun/lun_*/*"))
    acls = sorted(path.name for path in group.glob("acls/*"))
    anybody = _read(group / "attrib/generate_node_acls") == "1"
    if anybody:
        user, protected = _read(group / "auth/userid"), _read(group / _OPEN_PROTECT)
    else:
        acl = group / "acls" / (acls[0] if acls else "none")
        user, protected = _read(acl / "auth/userid"), _read(acl / f"lun_{LUN}/write_protect")
    checked = _read(group / "attrib/authentication") == "1"
    portal = any(group.glob("np/*"))
    return ActualTarget(
        number=number,
        iqn=IQN_PREFIX + name,
        luns=luns,
        backing=backing,
        online=online and linked and portal and checked and _read(group / "enable") == "1",
        read_only=protected == "1",
        serial=serial,
        accounts=(user,) if user not in ("", "NULL") else (),
        acl=("ALL", *acls) if anybody else tuple(acls),
    )


def create(target: Target, portal: tuple[str, int]) -> None:
    """Make a target; what there is of it is kept when it matches, secret and all."""
    found = next((item for item in targets() if item.number == target.number), None)
    if found is not None:
        if found.matches(target) and _secret(target) == target.chap_secret:
            return
        remove(target.number)
    for item in list(targets()):
        if item.iqn == target.iqn:  # of another number: never ours to keep
            remove(item.number)
    try:
        _build(target, portal)
    except BaseException:
        remove(target.number)
        raise


def _build(target: Target, portal: tuple[str, int]) -> None:
    """Make everything in the order in which it may be interrupted; initiators come in last."""
    # Buffered, which the kernel tells guests as a write cache: they flush. Else every single
    # write would be O_DSYNC.
    file = rtslib.FileIOStorageObject(
        BACKSTORE_PREFIX + target.iqn.removeprefix(IQN_PREFIX),
        dev=str(target.backing), size=target.backing.stat().st_size, wwn=target.serial,
        write_back=True, index=_INDEX_BASE + target.number,
    )  # fmt: skip
    for name, value in (("vendor_id", "STRATO"), ("product_id", "STRATOCACHE"), ("revision", "1")):
        attribute = Path(file.path, "wwn", name)
        if attribute.exists():  # product_id and revision since Linux 5.6
            attribute.write_text(value)
    thin = int(target.thin_provisioned)
    file.set_attribute("emulate_tpu", thin)
    file.set_attribute("emulate_tpws", thin)
    group = rtslib.TPG(rtslib.Target(rtslib.FabricModule("iscsi"), target.iqn), 1)
    group.set_attribute("authentication", 1)
    group.set_attribute("generate_node_acls", int(target.initiator is None))
    unit = rtslib.LUN(group, LUN, file, alias="disk")
    if target.initiator is None:
        group.set_attribute("demo_mode_write_protect", int(target.read_only))
        account = group
    else:
        account = rtslib.NodeACL(group, target.initiator, mode="create")
        rtslib.MappedLUN(account, LUN, unit, write_protect=target.read_only)
    account.chap_userid = target.chap_username
    account.chap_password = target.chap_secret
    if _secret(target) != target.chap_secret:  # rtslib swallows errors here
        raise Internal("target-daemon-error", "The kernel did not take the CHAP account.")
    address, port = portal
    rtslib.NetworkPortal(group, f"[{address}]" if ":" in address else address, port)
    group.enable = True


def remove(number: int) -> None:
    """Log everybody out and remove what there is of a target."""
    for item in list(targets()):
        if item.number == number:
            folder = ISCSI / item.iqn
            if (folder / GROUP).is_dir():
                lio_switch.remove_group(folder / GROUP)
            if folder.is_dir():
                folder.rmdir()
            name = BACKSTORE_PREFIX + item.iqn.removeprefix(IQN_PREFIX)
            for path in CORE.glob(f"fileio_*/{name}"):
                lio_switch.remove_backstore(path)


def sessions(number: int) -> Iterator[Session]:
    """Yield who is logged in; the kernel tells the addresses of bound initiators only."""
    iqns = [item.iqn for item in targets() if item.number == number]
    for group in (ISCSI / iqn / GROUP for iqn in iqns):
        lines = re.split(r"[\0\n]+", _read(group / "dynamic_sessions"))
        names = [(name, "") for name in lines if name]
        for acl in sorted(group.glob("acls/*")):
            lines = _read(acl / "info").split("\n")
            if not lines[0].startswith("No active"):
                address = next((line.split()[1] for line in lines if "Address" in line), "")
                names.append((acl.name, address))
        for count, (name, address) in enumerate(names, start=1):
            yield Session(count, 0, name, address)


def _secret(target: Target) -> str:
    group = ISCSI / target.iqn / GROUP
    account = group if target.initiator is None else group / "acls" / target.initiator
    return _read(account / "auth/password")


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return ""


class Server:
    """Answers requests; changes of one target follow each other, others go on beside them."""

    def __init__(self, portal: tuple[str, int]) -> None:
        self._portal = portal
        self._changing: dict[int, threading.Lock] = {}
        self._workers = ThreadPoolExecutor(_WORKERS_MAX)

    def serve(self, listener: socket.socket) -> None:
        """Answer until the process ends."""
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rwb") as stream, suppress(ConnectionError):
            line = stream.readline(_REQUEST_BYTES_MAX)
            if not line:  # only asked whether somebody listens
                return
            stream.write(json.dumps(self._answer_to(line)).encode() + b"\n")

    def _answer_to(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            return {"done": self._do(request["do"], request["with"])}
        except StratocacheError as error:
            return {"error": error.to_record()}
        except (OSError, rtslib.RTSLibError, ValueError, KeyError, TypeError) as error:
            # of a foreign error only the kind and number: its text may hold what was written
            reason = getattr(error, "strerror", None) or type(error).__name__
            log.error("%s at %s", type(error).__name__, _place(error))
            refused = Internal(
                "target-daemon-error",
                f"The kernel's iSCSI target refused ({reason}); the kernel's log may say more.",
            )
            return {"error": refused.to_record()}

    def _do(self, name: str, values: dict[str, Any]) -> Any:
        if name == "ping":
            return None
        if name == "list":
            return [asdict(item) for item in targets()]
        if name == "sessions":
            return [asdict(item) for item in sessions(values["number"])]
        if name == "remove":
            return self._change(values["number"], lambda: remove(values["number"]))
        assert name == "create", name
        target = Target(**{**values, "backing": Path(values["backing"])})
        return self._change(target.number, lambda: create(target, self._portal))

    def _change(self, number: int, change: Callable[[], None]) -> None:
        """Make one change, after another of the same target; what takes too long goes on alone."""
        busy = Conflict(
            "target-busy",
            f"Target {number} still has commands in flight after {_BUSY_TIMEOUT_S:g} s; stop its "
            "guest and try again.",
        )
        lock = self._changing.setdefault(number, threading.Lock())
        if not lock.acquire(timeout=_BUSY_TIMEOUT_S):
            raise busy
        done = self._workers.submit(change)
        done.add_done_callback(lambda _: lock.release())
        try:
            done.result(_BUSY_TIMEOUT_S)
        except TimeoutError:
            raise busy from None


def _place(error: BaseException) -> str:
    """Return where an error came from, without any value."""
    frames = traceback.extract_tb(error.__traceback__)
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[::-1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until killed; return the exit status of the command line's contract."""
    parser = argparse.ArgumentParser(prog="lio_server")
    parser.add_argument("--control", type=Path, required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args(arguments)
    logging.basicConfig(level="INFO", format="lio: %(levelname)s: %(message)s")
    os.umask(0o077)
    try:
        prepare()
    except StratocacheError as error:
        log.error("%s", error.message)
        return error.exit_status
    given.control.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(given.control))
        listener.listen(_BACKLOG)
        Server((given.address, given.port)).serve(listener)
    return 0


if __name__ == "__main__":
    sys.exit(main())
