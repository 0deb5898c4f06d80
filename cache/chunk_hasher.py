"""A process that hashes chunk files for the scrubber, where it can be in nobody's way.

    python -m stratocache.cache.chunk_hasher LIMIT_BYTES

It reads a line of JSON, pairs of a path and the SHA-256 in hexadecimal that the file should have,
and answers with a line: for each the file's length, or null for one that is not right, whatever the
reason; until its input ends. It changes nothing.

A process of its own, because a thread would need the interpreter's lock, which all guests' reads
need too: a thread of low priority that has it and does not get to run stops them. Standard library
only.
"""

import ctypes
import hashlib
import json
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path

from stratocache.cache.medium import read_medium

_NICEST = 19
_IOPRIO_WHO_PROCESS, _IOPRIO_IDLE = 1, 3 << 13  # ioprio_set(2)
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}


def main() -> None:
    """Answer until the input ends."""
    _give_way()
    limit_bytes = int(sys.argv[1])
    for line in sys.stdin:
        lengths = [
            _right_bytes(Path(path), digest, limit_bytes) for path, digest in json.loads(line)
        ]
        print(json.dumps(lengths), flush=True)


def _right_bytes(path: Path, digest: str, limit_bytes: int) -> int | None:
    """Return the length of a file that has its digest, None for another."""
    with suppress(OSError):
        content, _ = read_medium(path, limit_bytes)
        if len(content) <= limit_bytes and hashlib.sha256(content).hexdigest() == digest:
            return len(content)
    return None


def _give_way() -> None:
    """Take the lowest priority there is, for the processor and for the medium."""
    with suppress(OSError):
        os.nice(_NICEST)
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None).syscall(number, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_IDLE)


if __name__ == "__main__":
    with suppress(BrokenPipeError, KeyboardInterrupt):  # whoever asked has gone
        main()
