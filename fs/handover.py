"""What a supervisor hands to itself when it re-executes: same process, other code.

`execute` writes a JSON object into a memfd, lets that and the descriptors which it names survive
exec, and says in a variable where it is; `receive` reads it in the new program. Signals that would
end the process stay blocked between the two. Standard library only.
"""

import json
import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Never

FORMAT: Final = 1
"""Of the JSON object; a version that cannot read it must not be executed (`upgrade_check`)."""
FORMATS: Final = frozenset({FORMAT})
"""What this version can read."""

_VARIABLE = "SUPERVISOR_HANDOVER_FD"
_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def hold_signals() -> None:
    """Keep back what would stop the supervisor, until `release_signals` of whoever runs then."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def release_signals() -> None:
    """Let them come; call it when there are handlers."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def execute(
    command: Sequence[str],
    environment: Mapping[str, str],
    state: Mapping[str, Any],
    descriptors: Iterable[int],
) -> Never:
    """Become another program with the same process id, children and descriptors.

    Raises `OSError` with everything as before when that cannot be.
    """
    content = json.dumps({**state, "format": FORMAT}).encode()
    memory = os.memfd_create("supervisor-handover", os.MFD_CLOEXEC)
    kept = [memory, *descriptors]
    try:
        os.write(memory, content)
        for descriptor in kept:
            os.set_inheritable(descriptor, True)
        os.execve(command[0], list(command), {**environment, _VARIABLE: str(memory)})
    finally:
        for descriptor in kept:
            os.set_inheritable(descriptor, False)
        os.close(memory)


def receive() -> dict[str, Any] | None:
    """Return what our predecessor handed over, or None at a first start. Works once."""
    number = os.environ.pop(_VARIABLE, None)
    if number is None:
        return None
    with open(int(number), "rb") as memory:
        memory.seek(0)
        state: dict[str, Any] = json.load(memory)
    return state


def own(descriptor: int) -> int:
    """Keep an inherited descriptor from our own children; return it."""
    os.set_inheritable(descriptor, False)
    return descriptor
