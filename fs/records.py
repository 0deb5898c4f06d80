"""Rows of the state database as typed, frozen records."""

import json
import sqlite3
from dataclasses import dataclass
from typing import Any, Literal, NewType

from stratocache.cache.entry import Entry

DiskUuid = NewType("DiskUuid", str)
SnapshotId = NewType("SnapshotId", str)
ImageId = NewType("ImageId", str)

DiskForm = Literal["overlay", "raw"]
SnapshotForm = Literal["manifest", "file"]
Visibility = Literal["private", "public"]
DiskKind = Literal["machine", "data", "readonly"]
Access = Literal["rw", "ro"]
ImageState = Literal["fetching", "provisional", "verified", "rejected", "withdrawn", "deleting"]
SERVABLE = ("provisional", "verified")
"""States of an image in which it can be cloned and attached."""
READABLE = (*SERVABLE, "withdrawn")
"""States of an image in which what was made of it reads it."""
COMPLETE = ("verified", "withdrawn")
"""States of an image whose every byte was proven."""

SAVED_VALID_DAYS = 178
"""How long the metadata of a saved disk is valid, from its signing on, unless somebody says else."""


Role = Literal["user", "operator", "admin"]
"""What somebody may do at most (`api/ACCOUNTS.md`)."""
ROLES: tuple[Role, ...] = ("user", "operator", "admin")
"""Each may do all that those before it may."""
Scope = Literal["read", "launch", "disks", "images", "admin"]
"""What a token may be used for, within what its owner's role allows."""
SCOPES: tuple[Scope, ...] = ("read", "launch", "disks", "images", "admin")
ALL_SCOPES: frozenset[Scope] = frozenset(SCOPES)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: a user name, a role, and the scopes of the token that was sent."""

    name: str
    role: Role
    scopes: frozenset[Scope] = ALL_SCOPES
    claimed: Role | None = None
    """The role that an issuer, or the kernel, gives to who has no account of the name; None = without
    an account one is nobody."""
    of_host: bool = False
    """Whether the kernel makes one an administrator, whatever an account of the name says."""
    fingerprint_key: str | None = None
    """Of the certificate that was shown, as `accounts.certificate_key`: whose that is, one is."""

    @property
    def administrator(self) -> bool:
        """Whether everything is allowed."""
        return self.role == "admin"

    @property
    def operator(self) -> bool:
        """Whether images, the cache and everybody's work are theirs to look after."""
        return self.role in ("operator", "admin")


@dataclass(frozen=True, slots=True)
class DiskRequest:
    """A disk that somebody wants: blank of a size, or a clone of a reference or of a snapshot (an
    id), grown to the size if one is given."""

    size_bytes: int | None = None
    reference: str | None = None
    snapshot: str | None = None
    tag: str = ""
    visibility: Visibility = "private"
    kind: DiskKind = "data"
    volatile: bool = False


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """A disk that is to become an image, with what its metadata is to say of it."""

    snapshot: str | None = None
    """None = the disk as it is now."""
    title: str | None = None
    comment: str | None = None
    os: str | None = None
    os_version: str | None = None
    os_arch: str | None = None
    version: str | None = None
    author: str | None = None
    publisher: str | None = None
    kind: str = "machine"
    valid_days: int = SAVED_VALID_DAYS


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """A VM that somebody wants to boot: a clone of `reference` and what else it sees."""

    reference: str
    instance: str
    size_bytes: int | None = None
    disks: tuple[str, ...] = ()
    readonly: tuple[str, ...] = ()
    initiator: str | None = None
    provisional: bool = False
    """Whether bytes that nothing proves yet will do, where the policy allows them."""
    lease_s: int | None = None


@dataclass(frozen=True, slots=True)
class Image:
    """A cached image, or one on its way in or out."""

    number: int
    id: ImageId
    state: ImageState
    size_bytes: int | None
    sha256: str | None
    entry: Entry
    pinned: bool
    created_at: str
    verified_at: str | None
    last_used_at: str | None
    checked_at: str | None = None
    """When its catalogue last answered a question about it."""
    unlisted_since: str | None = None
    withdrawn_at: str | None = None
    withdrawn_because: str | None = None
    """A sentence."""
    skeleton_since: str | None = None
    """When eviction left its boot set only, or it was last put to sleep."""

    @property
    def asleep(self) -> bool:
        """Whether it is a skeleton whose rest nobody wants now."""
        if self.state != "provisional" or self.skeleton_since is None or self.pinned:
            return False
        return self.last_used_at is None or self.last_used_at <= self.skeleton_since

    @property
    def settled(self) -> bool:
        """Whether it is complete, or was, and nothing is being fetched of it."""
        return self.state in COMPLETE or self.asleep

    @property
    def unproven(self) -> bool:
        """Whether nothing proves what is read of it: it has no index and was never whole."""
        never_whole = self.state == "provisional" and self.skeleton_since is None
        return never_whole and self.entry.index is None


@dataclass(frozen=True, slots=True)
class Disk:
    """A block device that somebody owns."""

    number: int
    uuid: DiskUuid
    state: Literal["creating", "available", "deleting"]
    size_bytes: int
    base_image: ImageId | None
    form: DiskForm | None
    owner: str
    tag: str
    visibility: Visibility
    kind: DiskKind
    volatile: bool
    created_at: str
    base_manifest: str | None = None
    """Manifest that an overlay needs; None for a raw disk."""
    base_snapshot: SnapshotId | None = None
    generation: int = 0
    """How often what is exported of it has changed."""
    quarantined_at: str | None = None
    epoch: int = 0
    """That of its latest attachment."""
    problem: str | None = None
    """What is wrong with its files."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a disk was at one moment."""

    number: int
    id: SnapshotId
    disk_uuid: DiskUuid
    state: Literal["creating", "absorbing", "available", "deleting"]
    form: SnapshotForm | None
    size_bytes: int
    tag: str
    transient: bool
    owner: str
    created_at: str
    frozen_at: str | None


@dataclass(frozen=True, slots=True)
class Attachment:
    """A disk or image exported to one instance."""

    number: int
    id: str
    disk_uuid: DiskUuid | None
    image_id: ImageId | None
    instance: str
    role: Literal["boot", "disk", "readonly"]
    position: int
    access: Access
    initiator: str | None
    chap_username: str
    sealed_secret: str
    """See `stratocache.fs.secret_box`."""
    state: Literal["wanted", "ready", "removing"]
    owner: str
    created_at: str
    generation: int = 0
    """Of the disk, when the target was made."""
    epoch: int = 0
    """Which attachment of its disk it is, from 1 on; 0 = of an image."""
    lease_s: int | None = None
    lease_expires_at: str | None = None
    migrates: str | None = None
    """The attachment whose place it takes, as long as that exists."""
    migration_expires_at: str | None = None
    fencing: bool = False
    problem: str | None = None
    """Why it is not yet what it should be."""


@dataclass(frozen=True, slots=True)
class Launch:
    """An instance that was launched here and has not been halted."""

    instance: str
    operation_id: str
    request: dict[str, Any]
    state: Literal["preparing", "active", "ending"]
    boot_disk: DiskUuid | None
    created_at: str
    epoch: int = 0
    """Greater than that of any launch before."""
    lease_s: int | None = None
    lease_expires_at: str | None = None


@dataclass(frozen=True, slots=True)
class Operation:
    """Work that was asked for, with its progress and its end."""

    id: str
    kind: str
    subject: str
    state: Literal["pending", "running", "done", "failed", "cancelled"]
    request: dict[str, Any]
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    progress_bytes: int
    total_bytes: int | None
    cancel_requested: bool
    owner: str
    created_at: str
    updated_at: str
    rate_bytes_s: float = 0.0
    """At which progress grew lately."""
    request_id: str | None = None
    """Of the request that asked for it, as logs have it."""

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in ("done", "failed", "cancelled")


def image_from(row: sqlite3.Row) -> Image:
    """Read an `images` row."""
    fields = dict(row)
    fields["entry"] = Entry.model_validate_json(row["entry"])
    fields["pinned"] = bool(row["pinned"])
    return Image(**fields)


def disk_from(row: sqlite3.Row) -> Disk:
    """Read a `disks` row."""
    return Disk(**{**dict(row), "volatile": bool(row["volatile"])})


def snapshot_from(row: sqlite3.Row) -> Snapshot:
    """Read a `snapshots` row."""
    return Snapshot(**{**dict(row), "transient": bool(row["transient"])})


def attachment_from(row: sqlite3.Row) -> Attachment:
    """Read an `attachments` row."""
    return Attachment(**{**dict(row), "fencing": bool(row["fencing"])})


def launch_from(row: sqlite3.Row) -> Launch:
    """Read a `launches` row."""
    return Launch(**{**dict(row), "request": json.loads(row["request"])})


def operation_from(row: sqlite3.Row) -> Operation:
    """Read an `operations` row."""
    fields = dict(row)
    for name in ("request", "result", "error"):
        fields[name] = json.loads(row[name]) if row[name] is not None else None
    fields["cancel_requested"] = bool(row["cancel_requested"])
    return Operation(**fields)
