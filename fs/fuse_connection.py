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
import resource
import socket
import threading

import pyfuse3
import trio

log = logging.getLogger(__name__)

_MCL_CURRENT, _MCL_FUTURE = 1, 2
_THREAD_STACK_BYTES = 512 * 1024


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
            await pyfuse3.main()
        finally:
            pyfuse3.close(unmount=False)
            os.close(kernel)


def lock_memory() -> bool:
    """Keep this process in memory, with all it maps from now on; return whether that worked.

    A SIGKILL that arrives while the kernel copies a request into a page that is not resident can
    fail the request instead of keeping it for whoever comes next. Stacks of threads become small,
    as all of each is resident. Does nothing where locked memory is limited: later allocations would
    fail.
    """
    try:
        resource.setrlimit(
            resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        )
    except (OSError, ValueError):
        log.warning("locked memory is limited; a kill may fail a request in rare cases")
        return False
    threading.stack_size(_THREAD_STACK_BYTES)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE):
        log.warning("mlockall: %s", os.strerror(ctypes.get_errno()))
        return False
    return True
