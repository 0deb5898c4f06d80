"""The program in a kernel guest that does what tests of the host ask: calls of functions, by name.

    python -m support.guest_agent PORT

One pickled call per connection, (function, arguments), answered by a pickled pair: whether it
worked, and the value or the error. Guest and host read the same source tree, so a function means
the same on both sides.
"""

import pickle
import socket
import socketserver
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from stratocache.cache.errors import StratocacheError, from_record

_P = ParamSpec("_P")
_T = TypeVar("_T")
_CALL_TIMEOUT_S = 1200.0


class _Handler(socketserver.StreamRequestHandler):
    """One call."""

    def handle(self) -> None:
        """Read the call, do it, answer."""
        function, arguments, named = pickle.load(self.rfile)
        try:
            answer = (True, function(*arguments, **named))
        except StratocacheError as error:
            answer = (False, error.to_record())
        except Exception:  # noqa: BLE001 - whatever it was, the host is to see it
            answer = (False, traceback.format_exc())
        pickle.dump(answer, self.wfile)


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


def call(port: int, function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
    """Call a module's function in the guest whose agent is reached on a port of the loopback.

    Raises the `StratocacheError` that it raised there; any other error is an AssertionError.
    """
    with (
        socket.create_connection(("127.0.0.1", port), _CALL_TIMEOUT_S) as connection,
        connection.makefile("rwb") as stream,
    ):
        pickle.dump((function, arguments, named), stream)
        stream.flush()
        worked, value = pickle.load(stream)
    if isinstance(value, dict) and not worked:
        raise from_record(value)  # type: ignore[arg-type]
    assert worked, f"in the guest:\n{value}"
    result: _T = value
    return result


def run(
    command: list[str], timeout_s: float = 120.0, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program; for `call`."""
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=timeout_s, input=text or ""
    )


def main() -> None:
    """Serve until the machine ends."""
    with _Server(("0.0.0.0", int(sys.argv[1])), _Handler) as server:
        print("STRATO agent=ready", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
