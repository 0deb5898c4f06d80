"""Targets served by tgtd (tgt 1.0.85), through its management socket.

Spoken here (`stratocache.fs.tgt_protocol`) instead of starting `tgtadm`, as that takes secrets on
its command line and ten times as long.

What tgtd does and does not, as measured:
- A login is let in when the initiator's address *or* its name is on the access list, so a target
  bound to a name must not have ALL. Nothing on the list means that nobody gets in; it is filled
  last, as an initiator that finds no LUN gives up instead of trying again.
- Discovery lists whatever the access list allows, without any password, unless an account is bound
  to no target in particular. `create` binds one whose secret nobody knows: discovery is refused.
- Who connects while there is no target is cut off, who asks for one that is not there is refused;
  either may confuse initiators (`TARGETS.md`, "A fault of iscsid"). So the portal is opened last.
- The backing store `rdwr` calls fdatasync for SYNCHRONIZE CACHE and for writes with FUA, and the
  caching mode page says that there is a write cache.
"""

import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from stratocache.cache.errors import Conflict, InvalidInput, StratocacheError, Unreachable
from stratocache.fs.portal import Portal
from stratocache.fs.target import LUN, ActualTarget, Session, Target
from stratocache.fs.tgt_protocol import (
    NO_LUN,
    Management,
    Mode,
    Operation,
    Refused,
    Request,
    parse_portals,
    parse_sessions,
    parse_targets,
)

_ANSWER_TIMEOUT_S = 10.0
_BUSY_TIMEOUT_S = 10.0
_STUCK_TIMEOUT_S = 1.0
_BUSY_FIRST_DELAY_S = 0.002
_BUSY_DELAY_MAX_S = 0.1

_DISCOVERY_USER = "discovery"
_UNFIT = re.compile(r"[\x00-\x1f\x7f,]")


@dataclass(eq=False)
class _Order:
    """A target that is to be made, and what came of it."""

    target: Target
    begun: bool = False
    """Whether there is something of it, complete or not."""
    exists: bool = False
    """Whether nothing was done, as a target of its number was there."""
    error: StratocacheError | None = None


class Tgt:
    """A private tgtd; implements `stratocache.fs.target.TargetDaemon`."""

    def __init__(
        self,
        control: Path,
        portal: Portal,
        *,
        answer_timeout_s: float = _ANSWER_TIMEOUT_S,
        busy_timeout_s: float = _BUSY_TIMEOUT_S,
    ) -> None:
        self._tgtd = Management(control, answer_timeout_s)
        self._answer_timeout_s = answer_timeout_s
        self._busy_timeout_s = busy_timeout_s
        self._changing = trio.Lock()
        self._orders: list[_Order] = []
        """Those that wait for the lock; who gets it makes all of them."""
        self._control = control
        self._portal = portal
        self._stuck: set[int] = set()
        """Targets that a removal has waited for in vain; the next ones do not hold others up."""
        self._discovery_closed: object = None
        """The incarnation whose discovery is known to be refused."""

    async def ping(self) -> None:
        """Return when tgtd answers."""
        await self._tgtd.request(Mode.SYSTEM, Operation.SHOW)

    def incarnation(self) -> object:
        """Return which socket tgtd listens on: it makes a new one whenever it starts."""
        try:
            found = self._control.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_ctime_ns

    async def list(self) -> dict[int, ActualTarget]:
        """Return every target, complete or not, by number."""
        text = await self._tgtd.request(Mode.TARGET, Operation.SHOW)
        return {target.number: target for target in parse_targets(text)}

    async def sessions(self, number: int) -> tuple[Session, ...]:
        """Return who is logged in to a target."""
        try:
            text = await self._tgtd.request(Mode.CONNECTION, Operation.SHOW, number=number)
        except Refused as refusal:
            if refusal.error == "NO_TARGET":
                return ()
            raise
        return tuple(parse_sessions(text))

    async def create(self, target: Target) -> None:
        """Make a target, complete before anybody can log in; see `TargetDaemon.create`."""
        _check(target)
        order = _Order(target)
        self._orders.append(order)
        async with self._changing:
            if order in self._orders:
                orders, self._orders = self._orders, []
                await trio.to_thread.run_sync(self._make_all, orders)
            if order.exists:
                found = (await self.list()).get(target.number)
                if found is not None and found.matches(target):
                    return
                await self._remove(target.number)
                await trio.to_thread.run_sync(self._make_all, [order])
            if order.error is not None:
                if order.begun:
                    with trio.move_on_after(self._answer_timeout_s, shield=True):
                        with suppress(StratocacheError):
                            await self._remove(target.number)
                raise order.error

    async def remove(self, number: int) -> None:
        """Remove a target and its account; see `TargetDaemon.remove`."""
        async with self._changing:
            await self._remove(number)

    async def open_portal(self) -> None:
        """Let initiators in; see `TargetDaemon.open_portal`."""
        async with self._changing:
            await trio.to_thread.run_sync(self._open_portal)

    # -- steps

    def _open_portal(self) -> None:
        """Listen on the portal and nowhere else: where tgtd was started is nobody's business."""
        if self.incarnation() != self._discovery_closed:
            self._close_discovery()
        addresses = self._portal.addresses()
        ours = False
        for address, port in parse_portals(self._tgtd.ask(Request(Mode.PORTAL, Operation.SHOW))):
            if address in addresses and port == self._portal.port:
                ours = True
            else:
                where = f"portal={Portal(address, port)}"
                self._tgtd.ask(Request(Mode.PORTAL, Operation.DELETE, where))
        if ours:
            return
        try:
            self._tgtd.ask(Request(Mode.PORTAL, Operation.NEW, f"portal={self._portal}"))
        except Refused as refusal:
            raise Conflict(
                "portal-in-use",
                f"tgtd cannot listen on {self._portal}; stop the program that does, or set another "
                "iscsi.port.",
            ) from refusal

    def _make_all(self, orders: Sequence[_Order]) -> None:
        """Make targets, step by step, each step for all: in one thread, for a change of threads
        costs more than a target."""
        for order in orders:
            order.exists = order.begun = False
            order.error = None
        try:
            if self.incarnation() != self._discovery_closed:
                self._close_discovery()
            begun = self._begin(orders)
            self._complete(begun)
            if self.incarnation() != self._discovery_closed:
                self._close_discovery()  # started anew meanwhile
        except StratocacheError as error:
            for order in orders:
                order.error = order.error or error

    def _close_discovery(self) -> None:
        incarnation = self.incarnation()
        user = f"user={_DISCOVERY_USER}"
        account = f"{user},password={secrets.token_hex(16)}"
        for operation, parameters in ((Operation.NEW, account), (Operation.BIND, user)):
            self._tgtd.ask(Request(Mode.ACCOUNT, operation, parameters, accept="USER_EXIST"))
        self._discovery_closed = incarnation

    def _begin(self, orders: Sequence[_Order]) -> Sequence[_Order]:
        """Make targets that have nothing yet; return those that were not there."""
        begun = []
        for order, answer in self._ask_of_all(
            orders, Mode.TARGET, Operation.NEW, lambda target: f"targetname={target.iqn}"
        ):
            if isinstance(answer, Refused) and answer.error == "TARGET_EXIST":
                order.exists = True
            elif isinstance(answer, StratocacheError):
                order.error = answer
            else:
                order.begun = True
                begun.append(order)
        return begun

    def _complete(self, orders: Sequence[_Order]) -> None:
        for order, answer in self._ask_of_all(orders, Mode.ACCOUNT, Operation.NEW, _account):
            if isinstance(answer, Refused) and answer.error == "USER_EXIST":
                # left behind by a crash, perhaps with another secret
                target = order.target
                self._tgtd.ask(Request(Mode.ACCOUNT, Operation.DELETE, _user(target)))
                self._tgtd.ask(Request(Mode.ACCOUNT, Operation.NEW, _account(target)))
            elif isinstance(answer, StratocacheError):
                order.error = answer
        for mode, operation, parameters in (
            (Mode.ACCOUNT, Operation.BIND, _user),
            (Mode.LOGICAL_UNIT, Operation.NEW, _store),
            (Mode.LOGICAL_UNIT, Operation.UPDATE, _unit_parameters),
            (Mode.TARGET, Operation.BIND, lambda target: _acl_entry(target.initiator or "ALL")),
        ):
            going = [order for order in orders if order.error is None]
            for order, answer in self._ask_of_all(going, mode, operation, parameters):
                if isinstance(answer, StratocacheError):
                    order.error = answer

    def _ask_of_all(
        self,
        orders: Sequence[_Order],
        mode: Mode,
        operation: Operation,
        parameters: Callable[[Target], str],
    ) -> Iterator[tuple[_Order, str | Refused | Unreachable]]:
        lun = LUN if mode is Mode.LOGICAL_UNIT else NO_LUN
        requests = [
            Request(mode, operation, parameters(order.target), order.target.number, lun=lun)
            for order in orders
        ]
        return zip(orders, self._tgtd.ask_all(requests), strict=True)

    async def _remove(self, number: int) -> None:
        found = (await self.list()).get(number)
        if found is None:
            self._stuck.discard(number)
            return
        timeout_s = _STUCK_TIMEOUT_S if number in self._stuck else self._busy_timeout_s
        for name in found.acl:
            await self._tgtd.request(Mode.TARGET, Operation.UNBIND, _acl_entry(name), number=number)
        with trio.move_on_after(timeout_s):
            await self._log_out(number)
            # only now: without an account, whoever the access list names gets in unasked
            for user in found.accounts:
                await self._tgtd.request(Mode.ACCOUNT, Operation.DELETE, f"user={user}")
            for delay_s in _delays():
                if await self._delete(number):
                    self._stuck.discard(number)
                    return
                await trio.sleep(delay_s)
        self._stuck.add(number)
        raise Conflict(
            "target-busy",
            f"Target {found.iqn} still has commands in flight after {self._busy_timeout_s:g} s; "
            "stop its guest and try again.",
        )

    async def _log_out(self, number: int) -> None:
        for delay_s in _delays():
            sessions = await self.sessions(number)
            if not sessions:
                return
            for session in sessions:
                with suppress(Refused):  # gone by itself meanwhile
                    await self._tgtd.request(
                        Mode.CONNECTION, Operation.DELETE,
                        number=number, session=session.number, connection=session.connection,
                    )  # fmt: skip
            await trio.sleep(delay_s)

    async def _delete(self, number: int) -> bool:
        """Delete a target that nobody uses; without force, which makes tgtd exit on a late one."""
        try:
            await self._tgtd.request(Mode.TARGET, Operation.DELETE, number=number)
        except Refused as refusal:
            if refusal.error in ("TARGET_ACTIVE", "LUN_ACTIVE"):
                return False
            if refusal.error != "NO_TARGET":
                raise
        return True


def _delays() -> Iterator[float]:
    """Yield pauses between attempts, without end: the caller has a time limit."""
    delay_s = _BUSY_FIRST_DELAY_S
    while True:
        yield delay_s
        delay_s = min(2 * delay_s, _BUSY_DELAY_MAX_S)


def _user(target: Target) -> str:
    return f"user={target.chap_username}"


def _account(target: Target) -> str:
    return f"{_user(target)},password={target.chap_secret}"


def _store(target: Target) -> str:
    return f"path={target.backing},bstype=rdwr"


def _unit_parameters(target: Target) -> str:
    return (
        "targetOps vendor_id=STRATO,product_id=STRATOCACHE,product_rev=1,"
        f"scsi_sn={target.serial},scsi_id={target.serial},removable=0,"
        f"readonly={int(target.read_only)},thin_provisioning={int(target.thin_provisioned)},"
    )


def _acl_entry(name: str) -> str:
    return f"initiator-address={name}" if name == "ALL" else f"initiator-name={name}"


def _check(target: Target) -> None:
    """Refuse what tgtd's comma-separated parameters cannot carry."""
    for name, value in target.texts.items():
        if _UNFIT.search(value):
            raise InvalidInput(
                "target-value-unfit",
                f"tgtd cannot take a comma or a control character in {name}; choose another.",
                field=name,
            )
    if target.number <= 0:
        raise InvalidInput("target-value-unfit", "A target's number is greater than 0.")
