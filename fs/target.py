"""What an iSCSI target is, and what serves it: records and the seam to the target daemon."""

import hashlib
import re
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from stratocache.cache.errors import InvalidInput

LUN = 1
"""The only logical unit of every target."""

IQN_PREFIX = "iqn.2026-11.org.stratocache:"

# RFC 3722 leaves these characters of a normalised name; RFC 7143 4.2.7.1 limits it to 223 bytes.
_INITIATOR = re.compile(
    r"iqn\.[0-9]{4}-[0-9]{2}(\.[a-z0-9-]+)+(:[a-z0-9.:-]+)?|eui\.[0-9A-Fa-f]{16}|naa\.[0-9A-Fa-f]{16}"
    r"|naa\.[0-9A-Fa-f]{32}"
)
_INITIATOR_BYTES_MAX = 223


@dataclass(frozen=True, slots=True)
class Target:
    """One attachment as its target should be."""

    number: int
    """Target id, greater than 0; never that of another attachment."""
    iqn: str
    backing: Path
    """Absolute path of a regular file, opened by the daemon when the target is made."""
    read_only: bool
    serial: str
    """SCSI serial number and designator, as `serial_of` makes it."""
    chap_username: str
    """Unlike any other target's: the daemon's accounts are global."""
    chap_secret: str = field(repr=False)
    initiator: str | None = None
    """The only initiator that may log in; None = any that knows the secret."""
    thin_provisioned: bool = False
    """Whether the guest may give space back (UNMAP), by holes in the file."""

    @property
    def texts(self) -> dict[str, str]:
        """By name what a daemon is told as text, each of which its syntax must be able to carry."""
        return {
            "iqn": self.iqn,
            "backing": str(self.backing),
            "serial": self.serial,
            "chap_username": self.chap_username,
            "chap_secret": self.chap_secret,
            "initiator": self.initiator or "",
        }


@dataclass(frozen=True, slots=True)
class ActualTarget:
    """One target as the daemon has it. The secret cannot be seen."""

    number: int
    iqn: str
    luns: tuple[int, ...]
    """Logical units apart from the controller, LUN 0."""
    backing: str | None
    online: bool
    read_only: bool
    serial: str
    accounts: tuple[str, ...]
    acl: tuple[str, ...]
    initiators: tuple[str, ...] = ()
    """Who is logged in, as far as the daemon tells here; one more than once with several sessions."""

    def matches(self, target: Target) -> bool:
        """Whether this is the complete target that is wanted, as far as can be seen."""
        return self.difference(target) is None

    def difference(self, target: Target) -> str | None:
        """Return the first thing that is otherwise than wanted, None when nothing is."""
        strangers = set(self.initiators) - {target.initiator} if target.initiator else set()
        agreeing = {
            "number": self.number == target.number,
            "name": self.iqn == target.iqn,
            "logical units": self.luns == (LUN,),
            "file": self.backing == str(target.backing),
            "offline": self.online,
            "write protection": self.read_only == target.read_only,
            "serial": self.serial == target.serial,
            "account": self.accounts == (target.chap_username,),
            "access list": self.acl == (target.initiator or "ALL",),
            "session of another initiator": not strangers,
        }
        return next((name for name, agrees in agreeing.items() if not agrees), None)


@dataclass(frozen=True, slots=True)
class Session:
    """One connection of an initiator that has logged in."""

    number: int
    connection: int
    initiator: str
    address: str


class TargetDaemon(Protocol):
    """A daemon that serves files as iSCSI targets.

    Every method raises `Unreachable` (`target-daemon-unreachable`) when the daemon does not answer
    in time and `Internal` (`target-daemon-error`) when it refuses what it should do.
    """

    async def ping(self) -> None:
        """Return when the daemon answers."""

    def incarnation(self) -> object:
        """Return what is another for a daemon that was started anew, and so has no targets."""

    async def list(self) -> dict[int, ActualTarget]:
        """Return every target, complete or not, by number."""

    async def create(self, target: Target) -> None:
        """Make the target; return when initiators can log in.

        One that is there and matches stays untouched, one that does not match is made again.
        Raises `InvalidInput` for a value the daemon cannot take, and what `remove` raises.
        """

    async def remove(self, number: int) -> None:
        """Log initiators out and remove the target and its account; absent is fine.

        Other targets' sessions notice nothing. Raises `Conflict` (`target-busy`) when commands stay
        in flight; nobody can log in any more then, and it can be called again.
        """

    async def open_portal(self) -> None:
        """Let initiators connect; called when every target that should be is there.

        Until then a daemon that has lost its targets answers nobody: initiators try again, while
        some give up one that is not there. Open already is fine. Raises `Conflict`
        (`portal-in-use`) and `InvalidInput` (`portal-invalid`).
        """

    async def sessions(self, number: int) -> tuple[Session, ...]:
        """Return who is logged in; nobody when there is no such target."""


def iqn_of(attachment_id: str) -> str:
    """Return the target name of an attachment."""
    return IQN_PREFIX + attachment_id


def serial_of(subject: str) -> str:
    """Return the SCSI serial of a disk (its UUID) or an image (its id): 32 hexadecimal digits.

    The same for every attachment of one disk, so that a guest knows it again. Hexadecimal because
    tgt makes the NAA designator, by which Linux names disks, from such digits only.
    """
    try:
        return uuid.UUID(subject).hex
    except ValueError:
        return hashlib.sha256(subject.encode()).hexdigest()[:32]


def check_initiator_name(name: str) -> str:
    """Return a well-formed iSCSI initiator name; raise `InvalidInput` (`initiator-invalid`)."""
    if len(name) > _INITIATOR_BYTES_MAX or _INITIATOR.fullmatch(name) is None:
        raise InvalidInput(
            "initiator-invalid",
            "The initiator must be an iSCSI name in lower case such as "
            "iqn.2026-11.org.example:host, at most 223 characters.",
            field="initiator",
        )
    return name
