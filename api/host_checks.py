"""Checks of the kernel, the programs, the clock and the users of this host."""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from stratocache.api.judgement import Judgement, broken, doubtful, fine
from stratocache.cache.configuration import Configuration
from stratocache.fs.listener import group_id

_FUSE_DEVICE = Path("/dev/fuse")
_RESEND_KERNEL = (6, 9)
_OLDEST_KERNEL = (4, 19)
_LIO_MODULES = ("configfs", "target_core_mod", "target_core_file", "iscsi_target_mod")
_TGT_INSTEAD = 'or set iscsi.backend = "tgt"'
_SYSTEM_PATH = "/usr/sbin:/sbin:/usr/local/sbin"
_PROGRAM_TIMEOUT_S = 10
_EARLIEST_CLOCK_S = 1_767_225_600  # 2026-01-01: this software is younger than that
_TIMEX_BYTES = 208
_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised


def judge_user(_configuration: Configuration) -> Judgement:
    """Judge who runs this."""
    if os.geteuid() == 0:
        return fine("root")
    return doubtful(f"user {os.geteuid()}", "Run `stratocache serve` as root: it mounts.")


def judge_fuse(_configuration: Configuration) -> Judgement:
    """Judge whether FUSE can be used."""
    try:
        os.close(os.open(_FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return broken(
            f"{_FUSE_DEVICE}: {error.strerror}",
            "Load the module (`modprobe fuse`), or give the container /dev/fuse.",
        )
    return fine(str(_FUSE_DEVICE))


def judge_this_kernel(_configuration: Configuration) -> Judgement:
    """Judge the kernel that runs."""
    return judge_kernel(os.uname().release)


def judge_kernel(release: str) -> Judgement:
    """Judge a kernel release by what it enables."""
    numbers = re.match(r"(\d+)\.(\d+)", release)
    version = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if version >= _RESEND_KERNEL:
        return fine(
            f"Linux {release}: FUSE requests are re-sent, a restart of blockd is a short pause"
        )
    if version >= _OLDEST_KERNEL:
        return doubtful(
            f"Linux {release}: no FUSE_NOTIFY_RESEND, a restart of blockd makes initiators "
            "reconnect",
            "Linux 6.9 or newer makes restarts shorter.",
        )
    return broken(f"Linux {release}", "Use Linux 4.19 or newer.")


def judge_target(configuration: Configuration) -> Judgement:
    """Judge the programs, or the modules, that serve iSCSI."""
    if configuration.iscsi.backend == "lio":
        lacking = [module for module in _LIO_MODULES if not _has_module(module)]
        return judge_lio(os.uname().release, lacking)
    wanted = configuration.iscsi.tgtd
    found = _which(wanted)
    if found is None or _which("tgtadm") is None:
        missing = "tgtadm" if found else wanted
        return broken(f"{missing} is not on PATH", "Install the package tgt.")
    return fine(f"{found} {_version(found, '--version')}".strip())


def judge_lio(release: str, missing: Sequence[str]) -> Judgement:
    """Judge a kernel by the modules of LIO that it does not have; `serve` loads those it has."""
    if importlib.util.find_spec("rtslib_fb") is None:
        mend = f"Install stratocache[lio] (the package rtslib-fb), {_TGT_INSTEAD}."
        return broken("LIO: the library rtslib_fb is missing", mend)
    if missing:
        mend = f"Use a kernel with them (Debian's linux-image-amd64), {_TGT_INSTEAD}."
        return broken(f"LIO: no module {', '.join(missing)}", mend)
    return fine(f"LIO of Linux {release}")


def _has_module(module: str) -> bool:
    """Whether a module is loaded, built in, or can be loaded."""
    folder = Path("/lib/modules", os.uname().release)
    lists = (folder / name for name in ("modules.dep", "modules.builtin"))
    listed = re.compile(rf"/{module.replace('_', '[-_]')}\.ko")
    return Path("/sys/module", module).exists() or any(
        listed.search(path.read_text()) for path in lists if path.exists()
    )


def judge_qemu_img(_configuration: Configuration) -> Judgement:
    """Judge whether images can be converted."""
    found = _which("qemu-img")
    if found is None:
        return broken("qemu-img is not on PATH", "Install the package qemu-utils.")
    return fine(f"{found} {_version(found, '--version')}".strip())


def judge_signatures(_configuration: Configuration) -> Judgement:
    """Judge whether signatures can be verified."""
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
        return fine("lxml {}, xmlsec {}".format(*run.stdout.split()))
    reason = run.stderr.strip().rpartition("\n")[2] or f"status {run.returncode}"
    return broken(
        f"lxml and xmlsec do not load together: {reason}",
        "Install the two versions that setup.cfg pins.",
    )


def judge_this_clock(_configuration: Configuration) -> Judgement:
    """Judge this host's clock."""
    return judge_clock(time.time(), synchronised=_clock_synchronised())


def judge_clock(now_s: float, *, synchronised: bool) -> Judgement:
    """Judge a clock: validity of entries is judged by it."""
    shown = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now_s))
    if now_s < _EARLIEST_CLOCK_S:
        return broken(f"{shown} is long ago", "Set the clock; install chrony.")
    if not synchronised:
        return doubtful(
            f"{shown}, not known to be synchronised",
            "Install chrony or systemd-timesyncd: expiry of images is judged by this clock.",
        )
    return fine(f"{shown}, synchronised")


def _clock_synchronised() -> bool:
    if Path("/run/systemd/timesync/synchronized").exists():
        return True
    buffer = ctypes.create_string_buffer(_TIMEX_BYTES)  # modes 0: only ask
    status: int = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    return 0 <= status != _TIME_ERROR


def judge_group(configuration: Configuration) -> Judgement:
    """Judge whether others than root may use the API."""
    group = configuration.api.group
    if group_id(group) is None:
        return doubtful(
            f"no group {group}: only root may use the API", f"groupadd --system {group}"
        )
    return fine(group)


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
