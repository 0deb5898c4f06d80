"""tgtd's management protocol (tgt 1.0.85): requests, errors, and the text it answers with.

The socket takes one request per connection: a fixed header and a parameter text; it answers with
an error number and a text for people, which is all there is to read the state from. Layout and
numbers: `usr/tgtadm.h` and `usr/tgtadm_error.h` of tgt, checked against the real programs.
"""

import enum
import re
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import trio

from stratocache.cache.errors import Internal, StratocacheError, Unreachable
from stratocache.fs.target import LUN, ActualTarget, Session

_ANSWER_BYTES_MAX = 64 * 1024**2
_PART_BYTES = 64 * 1024
_AT_ONCE_MAX = 16
"""Requests that wait for tgtd; it lets twice as many connect."""

# struct tgtadm_req: mode, op, lld, len, tid, sid, lun, cid, host_no, device_type, ac_dir, pack, force
_REQUEST = struct.Struct("<II64sIiQQIIIIII")
_RESPONSE = struct.Struct("<II")
_TIMEVAL = struct.Struct("@ll")
_NO_NUMBER = -1
NO_LUN = 2**64 - 1
"""For requests that are not about a logical unit."""


class Mode(enum.IntEnum):
    """What a request is about."""

    SYSTEM = 0
    TARGET = 1
    LOGICAL_UNIT = 2
    PORTAL = 3
    CONNECTION = 6
    ACCOUNT = 7


class Operation(enum.IntEnum):
    """What is to be done."""

    NEW = 0
    DELETE = 1
    SHOW = 2
    BIND = 3
    UNBIND = 4
    UPDATE = 5


_ERRORS = (
    "SUCCESS", "UNKNOWN_ERR", "NOMEM", "NO_DRIVER", "NO_TARGET", "NO_LUN", "NO_SESSION",
    "NO_CONNECTION", "NO_BINDING", "TARGET_EXIST", "BINDING_EXIST", "LUN_EXIST", "ACL_EXIST",
    "ACL_NOEXIST", "USER_EXIST", "NO_USER", "TOO_MANY_USER", "INVALID_REQUEST",
    "OUTACCOUNT_EXIST", "TARGET_ACTIVE", "LUN_ACTIVE", "UNSUPPORTED_OPERATION", "UNKNOWN_PARAM",
)  # fmt: skip


class Refused(Internal):
    """tgtd answered with an error; `error` is its name in `tgtadm_error.h` without prefix."""

    def __init__(self, number: int, request: str) -> None:
        self.error = _ERRORS[number] if number < len(_ERRORS) else str(number)
        super().__init__(
            "target-daemon-error",
            f"tgtd refused '{request}' with TGTADM_{self.error}; its log may say more.",
        )


@dataclass(frozen=True, slots=True)
class Request:
    """One thing to ask of tgtd."""

    mode: Mode
    operation: Operation
    parameters: str = ""
    number: int = _NO_NUMBER
    """Of the target."""
    session: int = 0
    connection: int = 0
    lun: int = NO_LUN
    accept: str = ""
    """An error that is as good as success."""

    def pack(self) -> bytes:
        """Return the bytes that tgtd reads."""
        payload = self.parameters.encode() + b"\0" if self.parameters else b""
        header = _REQUEST.pack(
            self.mode, self.operation, b"iscsi", _REQUEST.size + len(payload), self.number,
            self.session, self.lun, self.connection, 0, 0, 0, 0, 0,
        )  # fmt: skip
        return header + payload


class Management:
    """The management socket of one tgtd."""

    def __init__(self, control: Path, answer_timeout_s: float) -> None:
        self._control = control
        seconds, fraction = divmod(answer_timeout_s, 1)
        self._time_limit = _TIMEVAL.pack(int(seconds), int(fraction * 1_000_000))

    async def request(
        self,
        mode: Mode,
        operation: Operation,
        parameters: str = "",
        *,
        number: int = _NO_NUMBER,
        session: int = 0,
        connection: int = 0,
    ) -> str:
        """Do as `ask` does, in a thread that a cancellation leaves to itself."""
        request = Request(mode, operation, parameters, number, session, connection)
        return await trio.to_thread.run_sync(self.ask, request, abandon_on_cancel=True)

    def ask(self, request: Request) -> str:
        """Ask tgtd for one thing and return its text; blocks.

        Raises `Refused`, and `Unreachable` (`target-daemon-unreachable`) without an answer in time.
        """
        (answer,) = self.ask_all([request])
        if isinstance(answer, StratocacheError):
            raise answer
        return answer

    def ask_all(self, requests: Sequence[Request]) -> list[str | Refused | Unreachable]:
        """Ask tgtd for several things, in any order, and return its texts, or what `ask` raises.

        All are sent before the first answer is waited for, so that both sides work at once.
        """
        answers: list[str | Refused | Unreachable] = []
        for first in range(0, len(requests), _AT_ONCE_MAX):
            answers += self._ask_some(requests[first : first + _AT_ONCE_MAX])
        return answers

    def _ask_some(self, requests: Sequence[Request]) -> list[str | Refused | Unreachable]:
        with ExitStack() as opened:
            sent: list[socket.socket | OSError] = []
            for request in requests:
                try:
                    sent.append(self._send(request, opened))
                except OSError as error:
                    sent.append(error)
            return [
                self._answer(request, stream)
                for request, stream in zip(requests, sent, strict=True)
            ]

    def _send(self, request: Request, opened: ExitStack) -> socket.socket:
        stream = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        # the kernel's limits, not Python's, which would poll before each call
        for limit in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            stream.setsockopt(socket.SOL_SOCKET, limit, self._time_limit)
        stream.connect(str(self._control))
        stream.sendall(request.pack())
        return stream

    def _answer(
        self, request: Request, stream: socket.socket | OSError
    ) -> str | Refused | Unreachable:
        try:
            if isinstance(stream, OSError):
                raise stream
            answer = _receive(stream)
        except OSError as error:
            return Unreachable(
                "target-daemon-unreachable",
                f"tgtd does not answer at {self._control} ({error or 'no answer in time'}); "
                "it is started again by itself, try again shortly.",
            )
        status, length = _RESPONSE.unpack_from(answer)
        if status and (status >= len(_ERRORS) or _ERRORS[status] != request.accept):
            return Refused(status, f"{request.operation.name} {request.mode.name}".lower())
        return answer[_RESPONSE.size : length].decode(errors="replace").rstrip("\0")


def _receive(stream: socket.socket) -> bytes:
    answer = bytearray()
    while part := stream.recv(_PART_BYTES):
        answer += part
        if len(answer) > _ANSWER_BYTES_MAX:
            raise OSError("endless answer")
    if len(answer) < _RESPONSE.size or len(answer) < _RESPONSE.unpack_from(answer)[1]:
        raise OSError("answer cut short")
    return bytes(answer)


@dataclass
class _Shown:
    """One target of `show target`, as its lines are read."""

    number: int
    iqn: str
    section: str = ""
    luns: dict[int, dict[str, str]] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    initiators: list[str] = field(default_factory=list)

    def read(self, indent: int, text: str) -> None:
        """Take one indented line."""
        if indent == 4:
            self.section = text
        elif text.startswith("Initiator: "):
            self.initiators.append(initiator_of(text.removeprefix("Initiator: ")))
        elif self.section.startswith("LUN") and indent == 8:
            self.luns[int(text.removeprefix("LUN: "))] = {}
        elif self.section.startswith("LUN"):
            key, _, value = text.partition(": ")
            self.luns[max(self.luns)][key] = value
        elif indent == 8:
            self.names.setdefault(self.section, []).append(text)

    def result(self) -> ActualTarget:
        """Return what was read."""
        lun = self.luns.get(LUN, {})
        path = lun.get("Backing store path", "None")
        return ActualTarget(
            number=self.number,
            iqn=self.iqn,
            luns=tuple(number for number in self.luns if number != 0),
            backing=None if path == "None" else path,
            online=lun.get("Online") == "Yes",
            read_only=lun.get("Readonly") == "Yes",
            serial=lun.get("SCSI SN", "").strip(),
            accounts=tuple(self.names.get("Account information:", ())),
            acl=tuple(self.names.get("ACL information:", ())),
            initiators=tuple(self.initiators),
        )


def parse_targets(text: str) -> Iterator[ActualTarget]:
    """Read the answer to SHOW TARGET."""
    shown: _Shown | None = None
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip(" "))
        if indent == 0 and (heading := re.fullmatch(r"Target ([0-9]+): (.*)", line)):
            if shown is not None:
                yield shown.result()
            shown = _Shown(int(heading[1]), heading[2])
        elif shown is not None:
            shown.read(indent, line.strip())
    if shown is not None:
        yield shown.result()


_PORTAL = re.compile(r"^Portal: \[?(?P<address>[^\]\n]+?)\]?:(?P<port>[0-9]+),", re.MULTILINE)


def parse_portals(text: str) -> Iterator[tuple[str, int]]:
    """Read the answer to SHOW PORTAL: numeric addresses and ports."""
    for found in _PORTAL.finditer(text):
        yield found["address"], int(found["port"])


_CONNECTION = re.compile(
    r"Session: (?P<session>[0-9]+)\n"
    r" *Connection: (?P<connection>[0-9]+)\n"
    r" *Initiator: (?P<initiator>.*)\n"
    r" *(?:IP Address: )?(?P<address>.*)"
)


def parse_sessions(text: str) -> Iterator[Session]:
    """Read the answer to SHOW CONNECTION."""
    for found in _CONNECTION.finditer(text):
        yield Session(
            number=int(found["session"]),
            connection=int(found["connection"]),
            initiator=initiator_of(found["initiator"]),
            address=found["address"],
        )


def initiator_of(text: str) -> str:
    """Return an initiator's name as tgtd shows it, without its alias."""
    return text.split(" alias:")[0]
