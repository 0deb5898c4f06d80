"""Memory that is there before it is used, in a process whose death must fail no request.

The kernel takes a request off its queue and copies it to the reader, or copies an answer from the
writer; when it cannot, the request fails with EIO, and re-send cannot help. It cannot when the
process is killed while a page of it that it never touched is brought in (SUPERVISOR.md). So no page
of this process may be like that: neither what it has now nor what it allocates later.
"""

import ctypes
import logging
import os
import re
import resource
import threading
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

_STACK_BYTES = 512 * 1024
"""Of each later thread, all of it in memory. C code that Python limits to 1,000 levels, as json's,
takes less than half of it; 8 MiB, the default, took 4 ms for each thread."""
_KEPT_FREE_BYTES = 64 * 1024**2
_HEAP_BYTES_MAX = 2 * 1024**2
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # mallopt(3)
_MCL_CURRENT, _MCL_FUTURE = 1, 2
_CAP_IPC_LOCK = 14
_LIBC = ctypes.CDLL(None, use_errno=True)


@cache
def keep_resident() -> None:
    """Have all memory of this process in RAM, now and when it grows (mlockall(2)); once.

    Blocks up to 2 MiB come from one heap and go back to it, so that libfuse's buffers and chunks
    are brought in once. Threads that exist have their stacks brought in whole: call this before
    there are any. Does nothing where locked memory is limited: allocations would fail.
    """
    if not _may_lock():
        log.warning("locked memory is limited; a kill may fail a request in rare cases")
        return
    _LIBC.mallopt(_M_ARENA_MAX, 1)
    _LIBC.mallopt(_M_MMAP_THRESHOLD, _HEAP_BYTES_MAX)
    _LIBC.mallopt(_M_TRIM_THRESHOLD, _KEPT_FREE_BYTES)
    threading.stack_size(_STACK_BYTES)
    if _LIBC.mlockall(_MCL_CURRENT | _MCL_FUTURE):
        log.warning("mlockall: %s", os.strerror(ctypes.get_errno()))


def _may_lock() -> bool:
    """Whether locked memory has no limit: by its resource limit, or by CAP_IPC_LOCK."""
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY:
        return True
    found = re.search(
        r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE
    )
    return found is not None and bool(int(found[1], 16) >> _CAP_IPC_LOCK & 1)
