"""Serving a FUSE connection that somebody else holds, from its start or from where another died.

libfuse begins with reading FUSE_INIT, which the kernel sends once per connection. So it is given
the recorded request through a socket pair put in place of `/dev/fuse`; the real descriptor comes
back in the `init` handler, just before the reply goes out. At first start the kernel takes that
reply; on a take-over it answers ENOENT, which libfuse ignores. Both ways are one code path.

What follows for `operations`: requests that a predecessor had read arrive again, so handlers can
be repeated; inode and handle numbers and lookup counts mean the same in every process.
"""

import os
import socket

import pyfuse3
import trio

_REQUESTS_MAX = 4096
"""Answered side by side: reads of an image whose origin says nothing wait for up to half a minute,
and must not keep others from being read. A waiting one costs 20 KiB."""


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
    Raises `RuntimeError` when libfuse refuses the descriptor. Memory that requests are copied into
    must be resident before: `stratocache.fs.resident`.
    """
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
