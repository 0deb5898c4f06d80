"""Serving a FUSE connection that somebody else holds, from its start or from where another died.

libfuse begins with reading FUSE_INIT, which the kernel sends once per connection. So it is given
the recorded request through a socket pair put in place of `/dev/fuse`; the real descriptor comes
back in the `init` handler, just before the reply goes out. At first start the kernel takes that
reply; on a take-over it answers ENOENT, which libfuse ignores. Both ways are one code path.

What follows for `operations`: requests that a predecessor had read arrive again, so handlers can
be repeated; inode and handle numbers and lookup counts mean the same in every process.
"""

import ctypes
import logging
import os
import re
import resource
import socket
from pathlib import Path

import pyfuse3
import trio

log = logging.getLogger(__name__)

_REQUESTS_MAX = 4096
"""Answered side by side: reads of an image whose origin says nothing wait for up to half a minute,
and must not keep others from being read. A waiting one costs 20 KiB."""
_BUFFER_BYTES = 257 * 4096
"""What libfuse allocates for each request that is being answered: 1 MiB and the head."""
_BUFFERS_TOUCHED = 8
_KEPT_FREE_BYTES = 64 * 1024**2
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_CAP_IPC_LOCK = 14


async def serve_inherited(
    operations: pyfuse3.Operations,
    descriptor: int,
    init_request: bytes,
    options: frozenset[str] = frozenset(),
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests until cancelled or until the file system is unmounted.

    `descriptor` is an inherited `/dev/fuse`, `init_request` what
    the file `RunDirectory.init_request` holds, `options` go to libfuse (`debug`). Reports
    to `task_status` when the first request can be answered. The mount itself stays as it is.
    Raises `RuntimeError` when libfuse refuses the descriptor.
    """
    lock_memory()
    touch_buffers()
    kernel = os.dup(descriptor)
    feed, fed = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    inherited_init = operations.init

    def init() -> None:
        os.dup2(kernel, descriptor, inheritable=False)
        inherited_init()
        task_status.started()

    with feed:
        with fed:
            feed.send(init_request)
            os.dup2(fed.fileno(), descriptor, inheritable=False)
        operations.init = init  # type: ignore[method-assign]
        pyfuse3.init(operations, f"/dev/fd/{descriptor}", set(options))
        try:
            await pyfuse3.main(max_tasks=_REQUESTS_MAX)
        finally:
            pyfuse3.close(unmount=False)
            os.close(kernel)


def lock_memory() -> bool:
    """Keep in memory whatever this process has touched, now or later; return whether that worked.

    A SIGKILL that arrives while the kernel copies a request into a page that is not resident can
    fail the request instead of keeping it for whoever comes next. Pages are locked when they are
    first touched (MCL_ONFAULT): filling each mapping at once took 0.2 s per thread. Does nothing
    where locked memory is limited: later allocations would fail.
    """
    if not _may_lock():
        log.warning("locked memory is limited; a kill may fail a request in rare cases")
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT):
        log.warning("mlockall: %s", os.strerror(ctypes.get_errno()))
        return False
    return True


def touch_buffers() -> None:
    """Bring in the memory that libfuse's first buffers will have, in the thread that serves.

    The kernel takes a request off its queue and copies it to the reader; when that fails because the
    reader is killed while a page that it never touched is brought in, the request fails, with EIO.
    Fresh buffers are such pages (SUPERVISOR.md). Freed blocks of this size go back to the heap, not
    to the system, and libfuse is given them next.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.mallopt(_M_MMAP_THRESHOLD, 2 * _BUFFER_BYTES)
    libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_FREE_BYTES)
    buffers = [libc.malloc(_BUFFER_BYTES) for _ in range(_BUFFERS_TOUCHED)]
    for buffer in buffers:
        if buffer is not None:
            ctypes.memset(buffer, 0, _BUFFER_BYTES)
        libc.free(buffer)


def _may_lock() -> bool:
    """Whether locked memory has no limit: by its resource limit, or by CAP_IPC_LOCK."""
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY:
        return True
    found = re.search(
        r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE
    )
    return found is not None and bool(int(found[1], 16) >> _CAP_IPC_LOCK & 1)
