"""Targets served by LIO, the kernel's own, through the process that makes them (`lio_server`)."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import trio

from stratocache.cache.errors import InvalidInput, Unreachable, from_record
from stratocache.fs.target import ActualTarget, Session, Target

_ANSWER_TIMEOUT_S = 30.0
_ANSWER_BYTES_MAX = 64 * 1024**2
_KERNEL = "the kernel"
# What the kernel reads from configfs ends at a line's end; 255 bytes fit (`iscsi_target_nego.h`).
_ACCOUNT_CHARACTERS_MAX = 255


class Lio:
    """LIO's targets of ours; implements `stratocache.fs.target.TargetDaemon`."""

    def __init__(self, control: Path, *, answer_timeout_s: float = _ANSWER_TIMEOUT_S) -> None:
        self._control = control
        self._answer_timeout_s = answer_timeout_s

    async def ping(self) -> None:
        """Return when the process that makes targets answers."""
        await self._ask("ping")

    def incarnation(self) -> object:
        """Return always the same: targets outlive all of our processes, and a host's end ends us."""
        return _KERNEL

    async def list(self) -> dict[int, ActualTarget]:
        """Return every target of ours, complete or not, by number; those of others are not seen."""
        return {item["number"]: _actual(item) for item in await self._ask("list")}

    async def create(self, target: Target) -> None:
        """Make a target, complete before anybody can log in; see `TargetDaemon.create`."""
        _check(target)
        await self._ask("create", **{**asdict(target), "backing": str(target.backing)})

    async def remove(self, number: int) -> None:
        """Remove a target and the kernel's hold on its file; see `TargetDaemon.remove`."""
        await self._ask("remove", number=number)

    async def open_portal(self) -> None:
        """Do nothing: the kernel enables each target with its portal last, and never loses one."""

    async def sessions(self, number: int) -> tuple[Session, ...]:
        """Return who is logged in to a target."""
        return tuple(Session(**item) for item in await self._ask("sessions", number=number))

    async def _ask(self, what: str, **values: Any) -> Any:
        try:
            with trio.fail_after(self._answer_timeout_s):
                answer = await self._exchange({"do": what, "with": values})
        except (OSError, trio.BrokenResourceError, trio.TooSlowError, ValueError) as error:
            raise Unreachable(
                "target-daemon-unreachable",
                f"The LIO process does not answer at {self._control} "
                f"({error or 'no answer in time'}); it is started again by itself, try again "
                "shortly.",
            ) from error
        if "error" in answer:
            raise from_record(answer["error"])
        return answer["done"]

    async def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        received = bytearray()
        async with await trio.open_unix_socket(self._control) as stream:
            await stream.send_all(json.dumps(request).encode() + b"\n")
            async for part in stream:
                received += part
                if len(received) > _ANSWER_BYTES_MAX:
                    raise OSError("endless answer")
        if not received.endswith(b"\n"):
            raise OSError("answer cut short")
        answer: dict[str, Any] = json.loads(received)
        return answer


def _actual(item: dict[str, Any]) -> ActualTarget:
    tuples = {name: tuple(item[name]) for name in ("luns", "accounts", "acl", "initiators")}
    return ActualTarget(**{**item, **tuples})


def _check(target: Target) -> None:
    """Refuse what configfs would cut or read as something else."""
    for name, value in target.texts.items():
        if (
            not value.isprintable()
            or value != value.strip()
            or "," in value  # separates the parameters of a file
            or len(value.encode()) > _ACCOUNT_CHARACTERS_MAX
            or value == "NULL"
        ):
            raise InvalidInput(
                "target-value-unfit",
                f"LIO cannot take {name} with a comma, a control character, outer spaces or more "
                f"than {_ACCOUNT_CHARACTERS_MAX} bytes; choose another.",
                field=name,
            )
    if target.number <= 0:
        raise InvalidInput("target-value-unfit", "A target's number is greater than 0.")
