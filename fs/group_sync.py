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
from collections.abc import Sequence
from contextlib import suppress

# io_setup, io_destroy, io_getevents, io_submit: linux/unistd.h
_CALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}.get(platform.machine())
_FSYNC = 2  # IOCB_CMD_FSYNC: linux/aio_abi.h
# struct iocb: data, key, rw_flags, opcode, reqprio, fd, buf, nbytes, offset, reserved, flags, resfd
_REQUEST = struct.Struct("<QIIHhIQQqQII")
_EVENT = struct.Struct("<QQqq")  # struct io_event: data, obj, res, res2
_AT_ONCE_MAX = 128
_LIBC = ctypes.CDLL(None, use_errno=True)


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
    count = len(descriptors)
    context = ctypes.c_ulong(0)
    if _CALLS is None:
        return list(map(_sync, descriptors))
    setup, destroy, get_events, submit = _CALLS
    # not in every kernel, not in every sandbox, and the host may have no contexts left
    if _LIBC.syscall(setup, count, ctypes.byref(context)) != 0:
        return list(map(_sync, descriptors))
    try:
        requests = ctypes.create_string_buffer(b"".join(
            _REQUEST.pack(index, 0, 0, _FSYNC, 0, descriptor, 0, 0, 0, 0, 0, 0)
            for index, descriptor in enumerate(descriptors)
        ), count * _REQUEST.size)  # fmt: skip
        start = ctypes.addressof(requests)
        pointers = (ctypes.c_void_p * count)(
            *range(start, start + count * _REQUEST.size, _REQUEST.size)
        )
        accepted = max(0, _LIBC.syscall(submit, context, count, pointers))
        outcomes = _collect(get_events, context, accepted)
        # what was not accepted, and file systems that cannot do it
        for index, descriptor in enumerate(descriptors):
            found = outcomes.get(index, errno.EINVAL)
            outcomes[index] = found
            if found == errno.EINVAL:
                refused = _sync(descriptor)
                outcomes[index] = 0 if refused is None else refused.errno or errno.EIO
    finally:
        _LIBC.syscall(destroy, context)
    return [
        None if outcomes[index] == 0 else OSError(outcomes[index], os.strerror(outcomes[index]))
        for index in range(count)
    ]


def _collect(get_events: int, context: ctypes.c_ulong, count: int) -> dict[int, int]:
    """Wait for `count` answers; return the error number of each, 0 for success."""
    found: dict[int, int] = {}
    events = ctypes.create_string_buffer(max(1, count) * _EVENT.size)
    while len(found) < count:
        with suppress(InterruptedError):
            got = _LIBC.syscall(get_events, context, 1, count - len(found), events, None)
            if got < 0:
                raise OSError(ctypes.get_errno(), "io_getevents")
            for index, _, result, _ in _EVENT.iter_unpack(events.raw[: got * _EVENT.size]):
                found[index] = -result
    return found
