"""Many files made durable at once: the kernel merges what each of them asks of the medium.

One fsync after the other costs a flush of the medium each, in threads a thread each. Submitted
together (io_submit(2), IOCB_CMD_FSYNC) twenty take hardly longer than one. Each is the fsync(2) of
its file, nobody else's.
"""

import ctypes
import errno
import os
import platform
import struct
import threading
from collections.abc import Sequence
from functools import cache

# io_setup, io_getevents, io_submit: asm/unistd.h
_CALLS = {"x86_64": (206, 208, 209), "aarch64": (0, 4, 2)}.get(platform.machine())
_FSYNC = 2  # IOCB_CMD_FSYNC: linux/aio_abi.h
# struct iocb: data, key, rw_flags, opcode, reqprio, fd, buf, nbytes, offset, reserved, flags, resfd
_REQUEST = struct.Struct("<QIIHhIQQqQII")
_EVENT = struct.Struct("<QQqq")  # struct io_event: data, obj, res, res2
_AT_ONCE_MAX = 128
_LIBC = ctypes.CDLL(None, use_errno=True)
_TURN = threading.Lock()
"""Held by the thread whose requests the context has."""


def sync_all(descriptors: Sequence[int]) -> list[OSError | None]:
    """Make files and directories durable; return what fsync(2) said of each, None for success."""
    outcomes: list[OSError | None] = []
    for first in range(0, len(descriptors), _AT_ONCE_MAX):
        some = descriptors[first : first + _AT_ONCE_MAX]
        outcomes += _submit(some) if len(some) > 1 else map(_sync, some)
    return outcomes


def _sync(descriptor: int) -> OSError | None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        return error
    return None


def _submit(descriptors: Sequence[int]) -> list[OSError | None]:
    with _TURN:
        errors = _ask_kernel(descriptors)
    # what was not accepted, and file systems that cannot do it
    return [
        _sync(descriptor) if error == errno.EINVAL else _as_error(error)
        for descriptor, error in zip(descriptors, errors, strict=True)
    ]


def _as_error(number: int) -> OSError | None:
    return OSError(number, os.strerror(number)) if number else None


def _ask_kernel(descriptors: Sequence[int]) -> list[int]:
    """Return the error number of each, 0 for success, EINVAL for what was not done."""
    count = len(descriptors)
    errors = [errno.EINVAL] * count
    context = _context()
    if context is None or _CALLS is None:
        return errors
    _, get_events, submit = _CALLS
    requests = ctypes.create_string_buffer(
        b"".join(
            _REQUEST.pack(index, 0, 0, _FSYNC, 0, descriptor, 0, 0, 0, 0, 0, 0)
            for index, descriptor in enumerate(descriptors)
        ),
        count * _REQUEST.size,
    )
    start = ctypes.addressof(requests)
    pointers = (ctypes.c_void_p * count)(
        *range(start, start + count * _REQUEST.size, _REQUEST.size)
    )
    accepted = max(0, _LIBC.syscall(submit, context, ctypes.c_long(count), pointers))
    events = ctypes.create_string_buffer(count * _EVENT.size)
    while accepted > 0:
        got = _LIBC.syscall(
            get_events, context, ctypes.c_long(1), ctypes.c_long(accepted), events, None
        )
        if got < 0 and ctypes.get_errno() != errno.EINTR:
            raise OSError(ctypes.get_errno(), "io_getevents")
        for index, _, result, _ in _EVENT.iter_unpack(events.raw[: max(0, got) * _EVENT.size]):
            errors[index] = -result
        accepted -= max(0, got)
    return errors


@cache
def _context() -> ctypes.c_ulong | None:
    """Return this process' context; None in kernels and sandboxes that have none.

    It is never given back: that takes as long as thirty flushes.
    """
    if _CALLS is None:
        return None
    context = ctypes.c_ulong(0)
    made = _LIBC.syscall(_CALLS[0], ctypes.c_long(_AT_ONCE_MAX), ctypes.byref(context))
    return context if made == 0 else None
