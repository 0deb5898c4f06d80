"""What a child of the supervisor may still do, set between fork and exec: the least that it needs.

Capabilities, also those it could get back; no new privileges by set-user-ID programs; with Landlock
(Linux 5.19) which files it may read and write, which TCP ports it may listen on and connect to, and
whom it may signal; with seccomp none of the system calls that serve only an administrator or an
attacker. What a kernel does not have is left out.
THREATS.md says which process has what. Standard library only, no threads.

Sources: landlock(7), capabilities(7), seccomp(2), `include/uapi/linux/{landlock,filter,audit}.h`.
"""

import ctypes
import logging
import os
import platform
import stat
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

CAP_NET_BIND_SERVICE, CAP_IPC_LOCK, CAP_SYS_RESOURCE = 10, 14, 24

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 24, 38, 47, 4
_CAPABILITY_VERSION = 0x20080522
_CAP_LAST_FILE = Path("/proc/sys/kernel/cap_last_cap")

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_EXECUTE, _WRITE, _READ, _LIST, _REFER, _TRUNCATE = 1, 2, 4, 8, 1 << 13, 1 << 14
_CHANGE = sum(1 << bit for bit in range(4, 13))
"""Making and removing names of every kind."""
_BIND, _CONNECT = 1, 2
_SCOPE_ABSTRACT_SOCKETS, _SCOPE_SIGNALS = 1, 2
_READING = _EXECUTE | _READ | _LIST
_OF_FILES = _EXECUTE | _WRITE | _READ | _TRUNCATE
SYSTEM_PATHS = (
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc", "/opt", "/proc", "/sys", "/run",
    "/var/lib/sss", "/var/cache/nscd", "/var/lib/extrausers",
)  # fmt: skip
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")
_SCRATCH = ("/tmp", "/var/tmp", "/dev/shm")  # nosec B108 # named, not used

_SET_FILTER, _ACTION_AVAILABLE, _FILTER_SPEC_ALLOW = 1, 2, 4
_RETURN_ALLOW, _RETURN_ERRNO = 0x7FFF0000, 0x00050000
_EPERM = 1
# machine: (number of seccomp(2), AUDIT_ARCH of the kernel, numbers of what is refused)
_CALLS: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "x86_64": (
        317, 0xC000003E,
        # ptrace, pivot_root, chroot, acct, mount, umount2, swapon, swapoff, reboot, iopl, ioperm,
        # *_module, quotactl, kexec_load, add_key, request_key, keyctl, unshare, perf_event_open,
        # open_by_handle_at, setns, process_vm_*, kexec_file_load, bpf, userfaultfd, open_tree,
        # move_mount, fsopen, fsconfig, fsmount, fspick, mount_setattr, clock_settime, settimeofday
        (101, 155, 161, 163, 165, 166, 167, 168, 169, 172, 173, 175, 176, 313, 179, 246, 248, 249,
         250, 272, 298, 304, 308, 310, 311, 320, 321, 323, 428, 429, 430, 431, 432, 433, 442, 227,
         164),
    ),
    "aarch64": (
        277, 0xC00000B7,
        (117, 41, 51, 89, 40, 39, 224, 225, 142, 105, 106, 273, 60, 104, 217, 218, 219, 97, 241,
         265, 268, 270, 271, 294, 280, 282, 428, 429, 430, 431, 432, 433, 442, 112, 170),
    ),
}  # fmt: skip
_X32_BIT = 0x40000000


@dataclass(frozen=True)
class Confinement:
    """What one kind of process needs."""

    capabilities: frozenset[int] = frozenset()
    readable: tuple[str, ...] = SYSTEM_PATHS
    """Beside what it may write, and devices without content."""
    writable: tuple[str, ...] = ()
    binds: frozenset[int] = frozenset()
    """TCP ports to listen on."""
    connects: frozenset[int] | None = None
    """TCP ports to connect to; None = all."""
    scratch: tuple[str, ...] = _SCRATCH
    """Writable too, and emptied by nobody of us."""
    signals: bool = False
    """To processes that are confined otherwise, too."""

    def prepare(self) -> "Prepared":
        """Do what takes memory and files, before the fork; the caller closes what is returned."""
        return Prepared(self.capabilities, _ruleset(self), _filter())


@dataclass
class Prepared:
    """A confinement ready to be entered."""

    capabilities: frozenset[int]
    ruleset: int
    """Of Landlock; -1 without."""
    program: "tuple[int, Any] | None"
    """Number of seccomp(2), and the filter."""
    _last: int = field(default_factory=lambda: int(_CAP_LAST_FILE.read_text()))
    _permitted: int = field(default_factory=lambda: _own_capabilities())

    def enter(self) -> bool:
        """Give up everything else, for good; run by the child. Tell whether that went well."""
        kept = sum(1 << number for number in self.capabilities) & self._permitted
        for number in range(self._last + 1):
            if not kept >> number & 1:  # refused where we may not: the next line stands in for it
                _LIBC.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
        if _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
            return False
        if self.ruleset >= 0 and _LIBC.syscall(_LANDLOCK_RESTRICT, self.ruleset, 0):
            return False
        if self.program is not None:
            number, program = self.program
            if _LIBC.syscall(number, _SET_FILTER, _FILTER_SPEC_ALLOW, ctypes.byref(program)):
                return False
        _LIBC.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
        header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
        low, high = kept & 0xFFFFFFFF, kept >> 32
        # effective, permitted, inheritable; twice, of 32 each
        return bool(_LIBC.capset(header, struct.pack("=6I", low, low, 0, high, high, 0)) == 0)

    def close(self) -> None:
        """Close what was opened for it."""
        if self.ruleset >= 0:
            os.close(self.ruleset)
            self.ruleset = -1


def _own_capabilities() -> int:
    """Return the capabilities that this process has to give."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1], 16) for line in status.splitlines() if line[:7] == "CapPrm:")


def program_paths() -> tuple[str, ...]:
    """Return where this interpreter, its libraries and our code are."""
    code = Path(__file__).resolve().parents[1]
    here = {sys.prefix, sys.base_prefix, *sys.path, str(code), str(code.parent)}
    linked = {os.path.realpath(path) for path in here if path}
    return tuple(sorted({path for path in here | linked if os.path.isabs(path)} - {"/"}))


def everything_readable() -> tuple[str, ...]:
    """Return all folders of the root directory but that of the devices."""
    names = sorted(os.listdir("/"))
    return tuple(f"/{name}" for name in names if name != "dev" and os.path.isdir(f"/{name}"))


def configured_paths(configuration: object) -> tuple[str, ...]:
    """Return the folders of all files that a configuration names, whatever its keys are called.

    Folders, as files are replaced; of a link that of what it leads to, too.
    """
    if isinstance(configuration, dict):
        configuration = list(configuration.values())
    if isinstance(configuration, list):
        return tuple(path for item in configuration for path in configured_paths(item))
    if isinstance(configuration, str) and configuration.startswith("/"):
        folders = {
            os.path.dirname(path) for path in (configuration, os.path.realpath(configuration))
        }
        return tuple(sorted(folders - {"/"}))
    return ()


def landlock_version() -> int:
    """Return the version of Landlock's interface, 0 without one that can be used."""
    found = _LIBC.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    return found if found >= 2 else 0  # the first allows no hard links between folders


def _ruleset(wanted: Confinement) -> int:
    """Return the descriptor of a Landlock ruleset, -1 when the kernel has none."""
    version = landlock_version()
    if not version:
        return -1
    writing = _READING | _WRITE | _CHANGE | _REFER | (_TRUNCATE if version >= 3 else 0)
    ports = _BIND | (_CONNECT if wanted.connects is not None else 0)
    scopes = _SCOPE_ABSTRACT_SOCKETS | (0 if wanted.signals else _SCOPE_SIGNALS)
    attributes = struct.pack(
        "=QQQ", writing, ports if version >= 4 else 0, scopes if version >= 6 else 0
    )
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _LIBC.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), 0)
    if ruleset < 0:
        log.warning("no Landlock: %s", os.strerror(ctypes.get_errno()))
        return -1
    try:
        _allow_paths(ruleset, (*wanted.readable, *program_paths()), _READING)
        _allow_paths(ruleset, _DEVICES, _READ | _WRITE)
        _allow_paths(ruleset, (*wanted.writable, *wanted.scratch), writing)
        if version >= 4:
            for right, numbers in ((_BIND, wanted.binds), (_CONNECT, wanted.connects or ())):
                for port in numbers:
                    _add(ruleset, 2, struct.pack("=QQ", right, port))
    except BaseException:
        os.close(ruleset)
        raise
    return int(ruleset)


def _allow_paths(ruleset: int, paths: Iterable[str], rights: int) -> None:
    for path in dict.fromkeys(paths):
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # not on this host
        try:
            folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            allowed = rights if folder else rights & _OF_FILES
            _add(ruleset, 1, struct.pack("=Qi", allowed, descriptor))
        finally:
            os.close(descriptor)


def _add(ruleset: int, kind: int, rule: bytes) -> None:
    if _LIBC.syscall(_LANDLOCK_ADD, ruleset, kind, rule, 0):
        code = ctypes.get_errno()
        raise OSError(code, f"landlock_add_rule: {os.strerror(code)}")


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _filter() -> tuple[int, _Program] | None:
    """Return a seccomp filter, None where we know no numbers or the kernel has no filters."""
    known = _CALLS.get(platform.machine())
    if known is None:
        return None
    seccomp, architecture, refused = known
    action = ctypes.c_uint32(_RETURN_ERRNO)
    if _LIBC.syscall(seccomp, _ACTION_AVAILABLE, 0, ctypes.byref(action)):
        log.warning("no seccomp: %s", os.strerror(ctypes.get_errno()))
        return None
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    refuse = (answer, 0, 0, _RETURN_ERRNO | _EPERM)
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), refuse, (load, 0, 0, 0)]
    if architecture == _CALLS["x86_64"][1]:
        code += [(at_least, 0, 1, _X32_BIT), refuse]
    for position, number in enumerate(refused):
        code.append((equal, len(refused) - position, 0, number))
    code += [(answer, 0, 0, _RETURN_ALLOW), refuse]
    packed = b"".join(struct.pack("=HBBI", *line) for line in code)
    return seccomp, _Program(len(code), packed)
