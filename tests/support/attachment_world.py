"""Target daemons with initiators, for histories of attachments: in memory, and a real tgtd.

Both are asked to do what the reconciler wants, by a process that may die around each step, and to
let initiators in. Who is logged in is looked at whenever that may have changed.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from stratocache.cache.errors import Conflict
from stratocache.fs.portal import Portal
from stratocache.fs.target import ActualTarget, Session, Target
from stratocache.fs.tgt import Tgt
from support.crashing import CrashingTargets, Fuse
from support.iscsi import Guest, Initiator, free_port, running_tgtd


@dataclass(frozen=True)
class Key:
    """What a launcher was given when its attachment was made; it may use it at any later time."""

    attachment: str
    epoch: int
    iqn: str
    secret: str
    name: str
    read_only: bool


class MemoryWorld(CrashingTargets):
    """Targets in memory, with sessions. A removal closes sessions first, and may find commands in
    flight that keep the target."""

    def __init__(self, fuse: Fuse) -> None:
        super().__init__(fuse)
        self.logged_in: set[tuple[str, str]] = set()
        self.busy = False
        self.watch: Callable[[], None] = lambda: None
        self._started = 0

    def incarnation(self) -> object:
        """Return how often it was started."""
        return self._started

    async def sessions(self, number: int) -> tuple[Session, ...]:
        """Return who is logged in to a target."""
        iqn = self.made[number].iqn if number in self.made else None
        return tuple(Session(1, 1, name, "") for held, name in self.logged_in if held == iqn)

    async def create(self, target: Target) -> None:
        """As tgtd does, and look at once who is in."""
        found = self.made.get(target.number)
        if found != target:
            self._log_out(found)
            await super().create(target)
        self.watch()

    async def remove(self, number: int) -> None:
        """Log initiators out, then remove the target unless commands are in flight."""
        self.fuse.step()
        self._log_out(self.made.get(number))
        self.fuse.step()
        if self.busy and number in self.made:
            raise Conflict("target-busy", "Commands are in flight.")
        await super().remove(number)
        self.watch()

    def _log_out(self, target: Target | None) -> None:
        if target is not None:
            self.logged_in -= {(iqn, name) for iqn, name in self.logged_in if iqn == target.iqn}

    def log_in(self, key: Key) -> bool:
        """Try to log in as an initiator."""
        for target in self.made.values():
            known = (target.iqn, target.chap_username, target.chap_secret)
            allowed = target.initiator in (None, key.name)
            if allowed and known == (key.iqn, key.attachment, key.secret):
                self.logged_in.add((key.iqn, key.name))
                self.watch()
                return True
        return False

    def look(self) -> tuple[set[str], set[str]]:
        """Return the targets that there are, and those that somebody is logged in to."""
        return {item.iqn for item in self.made.values()}, {iqn for iqn, _ in self.logged_in}

    def die(self) -> None:
        """Forget everything, as a daemon that is started anew."""
        self.made.clear()
        self.logged_in.clear()
        self._started += 1


class CrashingTgt(Tgt):
    """The real control of tgtd in a process that may die around each step."""

    fuse: Fuse
    busy = False

    async def list(self) -> dict[int, ActualTarget]:
        """As without deaths."""
        self.fuse.step()
        return await super().list()

    async def create(self, target: Target) -> None:
        """As without deaths."""
        self.fuse.step()
        await super().create(target)
        self.fuse.step()

    async def remove(self, number: int) -> None:
        """As without deaths; tgtd itself says when commands are in flight."""
        self.fuse.step()
        await super().remove(number)
        self.fuse.step()


class TgtWorld:
    """A real tgtd, and initiators of libiscsi that come back by themselves, also when cut off."""

    def __init__(self, folder: Path, fuse: Fuse) -> None:
        self._folder = folder
        self._port = free_port()
        self._stack = contextlib.ExitStack()
        self._guests: dict[Key, Guest] = {}
        self._start()
        self.targets = CrashingTgt(self._control, Portal("127.0.0.1", self._port))
        self.targets.fuse = fuse

    def _start(self) -> None:
        self._control = self._stack.enter_context(running_tgtd(self._folder, self._port))

    def log_in(self, key: Key) -> bool:
        """Begin to work as an initiator, if that is allowed."""
        initiator = Initiator(self._port, key.iqn, key.attachment, key.secret, key.name)
        if initiator.inquiry().returncode != 0:
            return False
        if key not in self._guests:
            self._guests[key] = Guest(initiator, read_only=key.read_only)
        return True

    def look(self) -> tuple[set[str], set[str]]:
        """Return the targets that there are, and those that somebody is logged in to."""

        async def ask() -> tuple[set[str], set[str]]:
            found = (await self.targets.list()).values()
            used = [item.iqn for item in found if await self.targets.sessions(item.number)]
            return {item.iqn for item in found}, set(used)

        left, self.targets.fuse.left = self.targets.fuse.left, None
        try:
            return trio.run(ask)
        finally:
            self.targets.fuse.left = left

    def die(self) -> None:
        """Kill tgtd and start it again, without targets."""
        self._stack.close()
        self._start()

    def close(self) -> None:
        """End everything."""
        for guest in self._guests.values():
            guest.kill()
        self._stack.close()
