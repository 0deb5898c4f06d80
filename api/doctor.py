"""Checks of the host that the daemon is to run on, each with a way to mend what is wrong."""

import ctypes
import errno
import importlib.util
import os
import re
import shutil
import socket
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from stratocache import __version__
from stratocache.api.sizes import format_size
from stratocache.cache.configuration import Configuration
from stratocache.cache.errors import StratocacheError, Unreachable
from stratocache.fs import lio_switch, reflink
from stratocache.fs.listener import group_id
from stratocache.fs.losses import losses
from stratocache.fs.pool import Pool
from stratocache.fs.run_directory import RunDirectory
from stratocache.fs.scrubbing import scrub_state
from stratocache.fs.state import Database
from stratocache.fs.supervisor_status import State, read_status


class Verdict(StrEnum):
    """How a check ended; only FAIL keeps the daemon from working."""

    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found, and how to mend it (empty when all is well)."""

    name: str
    verdict: Verdict
    detail: str
    mend: str = ""


_FUSE_DEVICE = Path("/dev/fuse")
_RESEND_KERNEL = (6, 9)
_OLDEST_KERNEL = (4, 19)
_SYSTEM_PATH = "/usr/sbin:/sbin:/usr/local/sbin"
_PROGRAM_TIMEOUT_S = 10
_SOCKET_PATH_BYTES_MAX = 107  # unix(7): sun_path, less its terminating zero
_LONGEST_SOCKET = "poke.sock"
_EARLIEST_CLOCK_S = 1_767_225_600  # 2026-01-01: this software is younger than that
_TIMEX_BYTES = 208
_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised


def examine(configuration: Configuration) -> list[Finding]:
    """Run every check; one that itself breaks is a FAIL with the reason."""
    findings = []
    for name, check in _CHECKS.items():
        try:
            findings.append(check(name, configuration))
        except StratocacheError as error:
            findings.append(Finding(name, Verdict.FAIL, error.message, "Do as the sentence says."))
        except OSError as error:
            findings.append(Finding(name, Verdict.FAIL, str(error), "Mend what the system names."))
    return findings


def _user(name: str, _configuration: Configuration) -> Finding:
    if os.geteuid() == 0:
        return Finding(name, Verdict.OK, "root")
    return Finding(
        name, Verdict.WARN, f"user {os.geteuid()}", "Run `stratocache serve` as root: it mounts."
    )


def _fuse(name: str, _configuration: Configuration) -> Finding:
    try:
        os.close(os.open(_FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return Finding(
            name,
            Verdict.FAIL,
            f"{_FUSE_DEVICE}: {error.strerror}",
            "Load the module (`modprobe fuse`), or give the container /dev/fuse.",
        )
    return Finding(name, Verdict.OK, str(_FUSE_DEVICE))


def _kernel(name: str, _configuration: Configuration) -> Finding:
    return kernel_finding(name, os.uname().release)


def kernel_finding(name: str, release: str) -> Finding:
    """Judge a kernel release by what it enables."""
    numbers = re.match(r"(\d+)\.(\d+)", release)
    version = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if version >= _RESEND_KERNEL:
        return Finding(
            name,
            Verdict.OK,
            f"Linux {release}: FUSE requests are re-sent, a restart of blockd is a short pause",
        )
    if version >= _OLDEST_KERNEL:
        return Finding(
            name,
            Verdict.WARN,
            f"Linux {release}: no FUSE_NOTIFY_RESEND, a restart of blockd makes initiators "
            "reconnect",
            "Linux 6.9 or newer makes restarts shorter.",
        )
    return Finding(name, Verdict.FAIL, f"Linux {release}", "Use Linux 4.19 or newer.")


def _target(name: str, configuration: Configuration) -> Finding:
    if configuration.iscsi.backend == "lio":
        lacking = [module for module in _LIO_MODULES if not _has_module(module)]
        return lio_finding(name, os.uname().release, lacking)
    wanted = configuration.iscsi.tgtd
    found = _which(wanted)
    if found is None or _which("tgtadm") is None:
        missing = "tgtadm" if found else wanted
        return Finding(name, Verdict.FAIL, f"{missing} is not on PATH", "Install the package tgt.")
    return Finding(name, Verdict.OK, f"{found} {_version(found, '--version')}".strip())


_LIO_MODULES = ("configfs", "target_core_mod", "target_core_file", "iscsi_target_mod")
_TGT_INSTEAD = 'or set iscsi.backend = "tgt"'


def lio_finding(name: str, release: str, missing: Sequence[str]) -> Finding:
    """Judge a kernel by the modules of LIO that it does not have; `serve` loads those it has."""
    if importlib.util.find_spec("rtslib_fb") is None:
        mend = f"Install stratocache[lio] (the package rtslib-fb), {_TGT_INSTEAD}."
        return Finding(name, Verdict.FAIL, "LIO: the library rtslib_fb is missing", mend)
    if missing:
        mend = f"Use a kernel with them (Debian's linux-image-amd64), {_TGT_INSTEAD}."
        return Finding(name, Verdict.FAIL, f"LIO: no module {', '.join(missing)}", mend)
    return Finding(name, Verdict.OK, f"LIO of Linux {release}")


def _has_module(module: str) -> bool:
    """Whether a module is loaded, built in, or can be loaded."""
    folder = Path("/lib/modules", os.uname().release)
    lists = (folder / name for name in ("modules.dep", "modules.builtin"))
    listed = re.compile(rf"/{module.replace('_', '[-_]')}\.ko")
    return Path("/sys/module", module).exists() or any(
        listed.search(path.read_text()) for path in lists if path.exists()
    )


def _qemu_img(name: str, _configuration: Configuration) -> Finding:
    found = _which("qemu-img")
    if found is None:
        return Finding(
            name, Verdict.FAIL, "qemu-img is not on PATH", "Install the package qemu-utils."
        )
    return Finding(name, Verdict.OK, f"{found} {_version(found, '--version')}".strip())


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:{_SYSTEM_PATH}")


def _version(program: str, flag: str) -> str:
    """Return the first version number that a program tells, or an empty text."""
    with suppress(OSError, subprocess.TimeoutExpired):
        run = subprocess.run(
            [program, flag],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_PROGRAM_TIMEOUT_S,
            check=False,
        )
        number = re.search(r"\d+(\.\d+)+", run.stdout)
        return number[0] if number else ""
    return ""


def _signatures(name: str, _configuration: Configuration) -> Finding:
    program = "import lxml, xmlsec; print(lxml.__version__, xmlsec.__version__)"
    run = subprocess.run(  # apart: libraries that do not fit may crash
        [sys.executable, "-c", program],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_PROGRAM_TIMEOUT_S,
        check=False,
    )
    if run.returncode == 0:
        return Finding(name, Verdict.OK, "lxml {}, xmlsec {}".format(*run.stdout.split()))
    reason = run.stderr.strip().rpartition("\n")[2] or f"status {run.returncode}"
    return Finding(
        name,
        Verdict.FAIL,
        f"lxml and xmlsec do not load together: {reason}",
        "Install the two versions that setup.cfg pins.",
    )


def _state_directory(name: str, configuration: Configuration) -> Finding:
    path = configuration.state_dir
    if not path.exists():
        parent = _existing(path)
        if os.access(parent, os.W_OK | os.X_OK):
            return Finding(name, Verdict.OK, f"{path} will be created")
        return Finding(
            name,
            Verdict.FAIL,
            f"{path} is missing",
            f"Create it, or give write access to {parent}.",
        )
    status = path.stat()
    if not stat.S_ISDIR(status.st_mode) or not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        return Finding(
            name, Verdict.FAIL, f"{path} is no directory that can be written",
            "Make it one, owned by the user that runs `stratocache serve`.",
        )  # fmt: skip
    if status.st_mode & 0o022:
        return Finding(name, Verdict.FAIL, f"{path} can be written by others", f"chmod go-w {path}")
    return Finding(name, Verdict.OK, f"{path}, mode {stat.S_IMODE(status.st_mode):04o}")


def _run_directory(name: str, configuration: Configuration) -> Finding:
    longest = configuration.run_dir.absolute() / _LONGEST_SOCKET
    if len(os.fsencode(longest)) > _SOCKET_PATH_BYTES_MAX:
        return Finding(
            name,
            Verdict.FAIL,
            f"{longest} is too long for a Unix socket",
            f"Choose a run_dir so that it has {_SOCKET_PATH_BYTES_MAX} bytes at most.",
        )
    parent = _existing(configuration.run_dir)
    if not os.access(parent, os.W_OK | os.X_OK):
        return Finding(
            name, Verdict.FAIL, f"{parent} cannot be written", "Give write access, or run as root."
        )
    return Finding(name, Verdict.OK, str(configuration.run_dir))


def _reflink(name: str, configuration: Configuration) -> Finding:
    directory = _existing(configuration.state_dir)
    if not os.access(directory, os.W_OK):
        return Finding(
            name, Verdict.WARN, f"{directory} cannot be written, so not tried", "Be root."
        )
    if reflink.supported(directory, directory):
        return Finding(name, Verdict.OK, f"{directory}: clones of whole images cost no space")
    pool = Pool.read(configuration.state_dir)
    if pool is not None:
        return Finding(name, Verdict.OK, f"the pool {pool.path} is mounted when the daemon starts")
    return Finding(
        name,
        Verdict.WARN,
        f"{directory} does not share extents: clones are overlays",
        "`stratocache pool create --size 100G` makes an XFS file the state directory, while that "
        "is empty; XFS (reflink=1) or btrfs serve as well.",
    )


def _space(name: str, configuration: Configuration) -> Finding:
    directory = _existing(configuration.state_dir)
    free = shutil.disk_usage(directory).free
    reserve = configuration.space.reserve_bytes
    detail = f"{format_size(free)} free, {format_size(reserve)} of it reserved"
    if free <= reserve:
        mend = f"Free space on {directory}, or lower space.reserve_bytes."
        return Finding(name, Verdict.FAIL, detail, mend)
    if free < 2 * reserve:
        return Finding(name, Verdict.WARN, detail, f"Free space on {directory} soon.")
    return Finding(name, Verdict.OK, detail)


def _cache(name: str, configuration: Configuration) -> Finding:
    if not configuration.database.exists():
        return Finding(name, Verdict.OK, "empty")
    with closing(Database(configuration.database)) as db:
        try:
            lost = losses(db)
            scrubbed = scrub_state(db)
        except sqlite3.OperationalError:
            return Finding(name, Verdict.OK, "its schema is brought up to date by the next start")
    if lost:
        disks = sorted({uuid for loss in lost for uuid in loss.disks})
        return Finding(
            name,
            Verdict.WARN,
            f"{len(lost)} chunks or manifests are lost, {len(disks)} disks need them",
            "`stratocache cache status` names them; bring their origins back and run `stratocache "
            "image verify`, or restore the disks.",
        )
    if scrubbed.state == "paused":
        return Finding(
            name, Verdict.WARN, "the scrubber is paused", "Run `stratocache cache scrub --resume`."
        )
    return Finding(name, Verdict.OK, f"last read whole: {scrubbed.finished_at or 'never'}")


def _clock(name: str, _configuration: Configuration) -> Finding:
    return clock_finding(name, time.time(), synchronised=_clock_synchronised())


def clock_finding(name: str, now_s: float, *, synchronised: bool) -> Finding:
    """Judge a clock: validity of entries is judged by it."""
    shown = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now_s))
    if now_s < _EARLIEST_CLOCK_S:
        return Finding(name, Verdict.FAIL, f"{shown} is long ago", "Set the clock; install chrony.")
    if not synchronised:
        return Finding(
            name,
            Verdict.WARN,
            f"{shown}, not known to be synchronised",
            "Install chrony or systemd-timesyncd: expiry of images is judged by this clock.",
        )
    return Finding(name, Verdict.OK, f"{shown}, synchronised")


def _clock_synchronised() -> bool:
    if Path("/run/systemd/timesync/synchronized").exists():
        return True
    buffer = ctypes.create_string_buffer(_TIMEX_BYTES)  # modes 0: only ask
    status: int = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    return 0 <= status != _TIME_ERROR


def _group(name: str, configuration: Configuration) -> Finding:
    group = configuration.api.group
    if group_id(group) is None:
        return Finding(
            name,
            Verdict.WARN,
            f"no group {group}: only root may use the API",
            f"groupadd --system {group}",
        )
    return Finding(name, Verdict.OK, group)


def _portal(name: str, configuration: Configuration) -> Finding:
    address, port = configuration.iscsi.address, configuration.iscsi.port
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            return _portal_fault(name, configuration, error)
    return Finding(name, Verdict.OK, f"{address}:{port} is free")


def _portal_fault(name: str, configuration: Configuration, error: OSError) -> Finding:
    where = f"{configuration.iscsi.address}:{configuration.iscsi.port}"
    if error.errno == errno.EADDRINUSE:
        if configuration.iscsi.backend == "lio" and any(lio_switch.groups()):
            return Finding(name, Verdict.OK, f"{where} is served by this kernel")
        if _listens(configuration.api_socket):
            return Finding(name, Verdict.OK, f"{where} is served by the running daemon")
        return Finding(
            name,
            Verdict.FAIL,
            f"{where} is in use by another program",
            "Stop that (perhaps the system's tgt), or set iscsi.port to a free one.",
        )
    return Finding(
        name, Verdict.FAIL, f"{where}: {error.strerror}",
        "Set iscsi.address to an address of this host.",
    )  # fmt: skip


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def peers_finding(name: str, configuration: Configuration) -> Finding:
    """Judge what asking and serving peers needs; raises `StratocacheError` for a file that cannot be
    used."""
    settings = configuration.peers
    if not settings.hosts and not settings.listen:
        return Finding(name, Verdict.OK, "none are configured")
    from stratocache.api import peer_check  # its libraries take long to import

    peer_check.require_files(settings)
    faults = peer_check.unreachable(settings)
    if faults:
        named = "; ".join(f"{peer}: {fault}" for peer, fault in sorted(faults.items()))
        return Finding(
            name, Verdict.WARN, named,
            "Mend what is named: start that host, give both the same token and authority.",
        )  # fmt: skip
    status = read_status(RunDirectory(configuration.run_dir).supervisor_status)
    if settings.listen and status is not None:
        serving = status.children.get("peers")
        if serving is None or not serving.ready:
            return Finding(
                name, Verdict.WARN, "the running daemon does not serve peers",
                f"Restart it if peers.listen is new; else its log says why port {settings.port} "
                "cannot be used.",
            )  # fmt: skip
    days = peer_check.certificate_days(settings)
    if days is not None:
        return Finding(
            name, Verdict.WARN, f"the certificate is valid for {days:.0f} days",
            "Run `stratocache peers init` again and copy what it makes.",
        )  # fmt: skip
    served = f"served on port {settings.port}" if settings.listen else "not served"
    return Finding(name, Verdict.OK, f"all of {', '.join(settings.hosts) or 'none'}; {served}")


def network_finding(name: str, configuration: Configuration) -> Finding:
    """Judge what serving the network needs."""
    api = configuration.api
    if not api.address:
        return Finding(name, Verdict.OK, "not served")
    from stratocache.api import web_certificate

    fault = web_certificate.fault(configuration) if api.tls else None
    if fault is not None:
        return Finding(name, Verdict.FAIL, fault, "Renew certificate and key, or correct [api].")
    if api.client_ca_file is not None and api.client_crl_file is not None:
        from stratocache.api.revocation import RevocationLists

        try:
            RevocationLists(api.client_crl_file, api.client_ca_file).require_usable()
        except Unreachable as error:
            return Finding(
                name, Verdict.FAIL, error.message.rstrip("."),
                "Until then nobody of that authority gets in by certificate.",
            )  # fmt: skip
    status = read_status(RunDirectory(configuration.run_dir).supervisor_status)
    if status is not None:
        serving = status.children.get("web")
        if serving is None or not serving.ready:
            return Finding(
                name, Verdict.WARN, "the running daemon does not serve the network",
                f"Restart it if api.address is new; else its log says why port {api.port} "
                "cannot be used.",
            )  # fmt: skip
    if configuration.first_token_file.exists():
        return Finding(
            name, Verdict.WARN, "there is no account yet",
            f"Make one with the token in {configuration.first_token_file}, or, as root, "
            "`stratocache account create NAME --role admin`.",
        )  # fmt: skip
    return Finding(name, Verdict.OK, f"{api.address}, port {api.port}")


def _daemon(name: str, configuration: Configuration) -> Finding:
    status = read_status(RunDirectory(configuration.run_dir).supervisor_status)
    if status is None:
        return Finding(name, Verdict.OK, "not running")
    detail = f"version {status.version}, process {status.pid}, {status.state}"
    if status.state is State.FROZEN:
        return Finding(
            name, Verdict.FAIL, f"{detail}: blockd crashes again and again, guests wait",
            "See the log, install a version that works, then `stratocache upgrade`.",
        )  # fmt: skip
    if status.version != __version__:
        return Finding(
            name, Verdict.WARN, f"{detail}; this is version {__version__}",
            "`stratocache upgrade` lets the daemon go on with this version.",
        )  # fmt: skip
    return Finding(name, Verdict.OK, detail)


def _existing(path: Path) -> Path:
    """Return the path, or its nearest parent that exists."""
    return next(found for found in _upwards(path.absolute()) if found.exists())


def _upwards(path: Path) -> Iterator[Path]:
    yield path
    yield from path.parents


_CHECKS: dict[str, Callable[[str, Configuration], Finding]] = {
    "user": _user,
    "fuse": _fuse,
    "kernel": _kernel,
    "tgtd": _target,
    "qemu-img": _qemu_img,
    "signatures": _signatures,
    "state directory": _state_directory,
    "run directory": _run_directory,
    "reflink": _reflink,
    "space": _space,
    "cache": _cache,
    "clock": _clock,
    "group": _group,
    "portal": _portal,
    "peers": peers_finding,
    "network": network_finding,
    "daemon": _daemon,
}
