"""What responses carry: one pydantic model per resource, and its entity tag."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from stratocache.api import connection_details
from stratocache.cache.configuration import Configuration
from stratocache.cache.entry import Entry
from stratocache.fs.fetch_account import DiskAccount, ImageAccount, Sample
from stratocache.fs.lineage import DiskNode, Lineage, SnapshotNode
from stratocache.fs.pace import remaining_s
from stratocache.fs.records import (
    Attachment,
    Caller,
    Disk,
    Image,
    ImageState,
    Launch,
    Operation,
    Snapshot,
)
from stratocache.fs.secret_box import SecretBox
from stratocache.fs.shares import Share
from stratocache.fs.target import LUN


class Representation(BaseModel):
    """Base of everything that is answered."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_json(self) -> bytes:
        """Return the bytes of the response."""
        return self.model_dump_json().encode()

    @property
    def etag(self) -> str:
        """A strong validator (RFC 9110 section 8.8.3): the digest of the representation."""
        return self.to_json_and_etag()[1]

    def to_json_and_etag(self) -> tuple[bytes, str]:
        """Return both, for the price of one."""
        content = self.to_json()
        return content, hashlib.sha256(content).hexdigest()[:32]


def _plain(view: Representation, base: type[Representation]) -> Representation:
    """Return the part of a view that a base class of it has."""
    return base(**{name: getattr(view, name) for name in base.model_fields})


class ImageView(Representation):
    """An image."""

    id: str
    state: ImageState
    size_bytes: int | None
    sha256: str | None
    pinned: bool
    created_at: str
    verified_at: str | None
    last_used_at: str | None
    withdrawn_at: str | None
    withdrawn_because: str | None
    """Why its catalogue took it back, a sentence."""
    entry: Entry

    @classmethod
    def of(cls, image: Image) -> Self:
        """Show an image."""
        return cls(
            id=image.id,
            state=image.state,
            size_bytes=image.size_bytes,
            sha256=image.sha256,
            pinned=image.pinned,
            created_at=image.created_at,
            verified_at=image.verified_at,
            last_used_at=image.last_used_at,
            withdrawn_at=image.withdrawn_at,
            withdrawn_because=image.withdrawn_because,
            entry=image.entry,
        )


class TrafficSample(Representation):
    """What was fetched, and waited for, in ten seconds."""

    at: str
    remote_bytes: int
    remote_wait_s: float


def _samples(history: Iterable[Sample]) -> list[TrafficSample]:
    return [TrafficSample(**asdict(sample)) for sample in history]


class LineageSnapshot(Representation):
    """A snapshot, and the disks that were cloned of it."""

    id: str
    state: Literal["creating", "absorbing", "available", "deleting"]
    tag: str
    created_at: str
    disks: "list[LineageDisk]"

    @classmethod
    def of(cls, node: SnapshotNode) -> Self:
        """Show a snapshot with its clones."""
        snapshot = node.snapshot
        return cls(
            id=snapshot.id,
            state=snapshot.state,
            tag=snapshot.tag,
            created_at=snapshot.created_at,
            disks=[LineageDisk.of(disk) for disk in node.disks],
        )


class LineageDisk(Representation):
    """A disk that began as an image, who has it, and its snapshots."""

    uuid: str
    state: Literal["creating", "available", "deleting"]
    form: Literal["overlay", "raw"] | None
    owner: str
    tag: str
    attached_to: list[str]
    snapshots: list[LineageSnapshot]

    @classmethod
    def of(cls, node: DiskNode) -> Self:
        """Show a disk with what was made of it."""
        disk = node.disk
        return cls(
            uuid=disk.uuid,
            state=disk.state,
            form=disk.form,
            owner=disk.owner,
            tag=disk.tag,
            attached_to=list(node.attached_to),
            snapshots=[LineageSnapshot.of(snapshot) for snapshot in node.snapshots],
        )


class ImageDetails(ImageView):
    """An image, what it cost to fetch, and what was made of it."""

    remote_bytes: int
    peer_bytes: int
    remote_wait_s: float
    dedup_bytes: int
    shared_bytes: int | None
    """Of its chunks that others have too; None when it is not known."""
    stored_bytes: int | None
    cache_saved_bytes: int
    hits: int
    hit_bytes: int
    misses: int
    miss_bytes: int
    hit_ratio: float | None
    local_bytes: int | None
    rate_bytes_s: float
    complete_in_s: float | None
    traffic_history: list[TrafficSample]
    local_map: list[float] | None = None
    """With `?map=N`: the share that is here of each of N equal parts."""
    checked_at: str | None
    """When its catalogue last answered a question about it; None = not since it was fetched."""
    attached_to: list[str]
    """Instances that have it read-only; for operators."""
    disks: list[LineageDisk]
    """Made of it, and visible to the caller: oldest first, clones of a snapshot below it."""
    disk_count: int
    snapshot_count: int
    omitted_count: int
    """Of these, those that are not named here as there are too many."""

    def to_json_and_etag(self) -> tuple[bytes, str]:
        """Return both; the validator is of the image alone: what it cost changes all the time."""
        return self.to_json(), _plain(self, ImageView).etag

    @classmethod
    def with_account(
        cls,
        image: Image,
        account: ImageAccount,
        lineage: Lineage,
        attached_to: list[str],
        *,
        shared_bytes: int | None,
        local_map: list[float] | None = None,
    ) -> Self:
        """Show an image with its account and what was made of it."""
        return cls(
            **dict(ImageView.of(image)),
            **{**asdict(account), "traffic_history": _samples(account.traffic_history)},
            shared_bytes=shared_bytes,
            local_map=local_map,
            checked_at=image.checked_at,
            attached_to=attached_to,
            disks=[LineageDisk.of(disk) for disk in lineage.disks],
            disk_count=lineage.disk_count,
            snapshot_count=lineage.snapshot_count,
            omitted_count=lineage.omitted_count,
        )


class DiskView(Representation):
    """A disk."""

    uuid: str
    state: Literal["creating", "available", "deleting"]
    size_bytes: int
    base_image: str | None
    base_snapshot: str | None
    form: Literal["overlay", "raw"] | None
    owner: str
    tag: str
    visibility: Literal["private", "public"]
    kind: Literal["machine", "data", "readonly"]
    volatile: bool
    quarantined_at: str | None
    """When it was kept as its instance had failed; None = it is not in quarantine."""
    created_at: str
    attached_to: list[str]
    """Instances that have it now."""
    epoch: int
    """That of its latest attachment."""
    problems: list[str]
    """What is wrong with it and its attachments, sentences for people."""

    @classmethod
    def of(cls, disk: Disk, attachments: list[Attachment]) -> Self:
        """Show a disk; `attachments` are its own."""
        return cls(
            uuid=disk.uuid,
            state=disk.state,
            size_bytes=disk.size_bytes,
            base_image=disk.base_image,
            base_snapshot=disk.base_snapshot,
            form=disk.form,
            owner=disk.owner,
            tag=disk.tag,
            visibility=disk.visibility,
            kind=disk.kind,
            volatile=disk.volatile,
            quarantined_at=disk.quarantined_at,
            created_at=disk.created_at,
            attached_to=[attachment.instance for attachment in attachments],
            epoch=disk.epoch,
            problems=[
                problem
                for problem in dict.fromkeys(
                    [disk.problem, *(item.problem for item in attachments)]
                )
                if problem is not None
            ],
        )


class DiskDetails(DiskView):
    """A disk, and what fetching cost it."""

    remote_bytes: int
    """Of its image, fetched because a read of this disk waited for them."""
    remote_wait_s: float
    boot_remote_bytes: int
    """The same since the disk was attached last."""
    boot_remote_wait_s: float
    cache_saved_bytes: int
    """Of its image that were here when it was cloned."""
    traffic_history: list[TrafficSample]
    fenced: bool
    """Whether its image was rejected, so that it cannot be attached."""

    @classmethod
    def with_account(
        cls, disk: Disk, attachments: list[Attachment], account: DiskAccount, *, fenced: bool
    ) -> Self:
        """Show a disk with its account."""
        return cls(
            **dict(DiskView.of(disk, attachments)),
            **{**asdict(account), "traffic_history": _samples(account.traffic_history)},
            fenced=fenced,
        )

    def to_json_and_etag(self) -> tuple[bytes, str]:
        """Return both; the validator is of the disk alone: what it cost changes all the time."""
        return self.to_json(), _plain(self, DiskView).etag


class ShareView(Representation):
    """Who else may use a disk."""

    user: str
    access: Literal["read", "write"]
    """read: see, clone, download, attach read-only; write: also attach, upload, take snapshots."""
    created_at: str

    @classmethod
    def of(cls, share: Share) -> Self:
        """Show a share."""
        return cls(user=share.user, access=share.access, created_at=share.created_at)


class SnapshotView(Representation):
    """A snapshot."""

    id: str
    disk_uuid: str
    state: Literal["creating", "absorbing", "available", "deleting"]
    size_bytes: int
    tag: str
    owner: str
    created_at: str
    frozen_at: str | None
    """From when on the disk may differ from it."""

    @classmethod
    def of(cls, snapshot: Snapshot) -> Self:
        """Show a snapshot."""
        return cls(
            id=snapshot.id,
            disk_uuid=snapshot.disk_uuid,
            state=snapshot.state,
            size_bytes=snapshot.size_bytes,
            tag=snapshot.tag,
            owner=snapshot.owner,
            created_at=snapshot.created_at,
            frozen_at=snapshot.frozen_at,
        )


class Chap(Representation):
    """CHAP credentials (RFC 1994) of one attachment."""

    username: str
    secret: str


class AttachmentView(Representation):
    """An attachment; what would let somebody log in is only shown to those who may."""

    id: str
    state: Literal["wanted", "ready", "removing"]
    disk_uuid: str | None
    image_id: str | None
    instance: str
    role: Literal["boot", "disk", "readonly"]
    access: Literal["rw", "ro"]
    initiator: str | None
    owner: str
    created_at: str
    epoch: int
    """Greater than that of any attachment of the disk before; 0 of an image."""
    lease_s: int | None
    lease_expires_at: str | None
    migrates: str | None
    """The attachment whose place it takes."""
    migration_expires_at: str | None
    problem: str | None
    """Why it is not yet what it should be."""
    portal: str
    target_iqn: str
    lun: int
    chap: Chap | None
    iscsi_url: str | None
    libvirt_xml: str
    qemu_args: list[str]

    @classmethod
    def of(
        cls,
        configuration: Configuration,
        secrets: SecretBox,
        caller: Caller,
        attachment: Attachment,
        index: int,
    ) -> Self:
        """Show an attachment to `caller`; `index` counts the instance's disks from 0.

        Only its owner and administrators are given the secret. Raises `Internal`
        (`secret-unreadable`).
        """
        details = connection_details.details_of(configuration, attachment)
        chap = None
        if caller.administrator or caller.name == attachment.owner:
            secret = secrets.open(attachment.id, attachment.sealed_secret)
            chap = Chap(username=attachment.chap_username, secret=secret)
        return cls(
            id=attachment.id,
            state=attachment.state,
            disk_uuid=attachment.disk_uuid,
            image_id=attachment.image_id,
            instance=attachment.instance,
            role=attachment.role,
            access=attachment.access,
            initiator=attachment.initiator,
            owner=attachment.owner,
            created_at=attachment.created_at,
            epoch=attachment.epoch,
            lease_s=attachment.lease_s,
            lease_expires_at=attachment.lease_expires_at,
            migrates=attachment.migrates,
            migration_expires_at=attachment.migration_expires_at,
            problem=attachment.problem,
            portal=details.portal,
            target_iqn=details.target_iqn,
            lun=LUN,
            chap=chap,
            iscsi_url=details.iscsi_url(chap.secret) if chap else None,
            libvirt_xml=connection_details.libvirt_xml(details, index),
            qemu_args=connection_details.qemu_args(details),
        )


class LaunchView(Representation):
    """An instance and everything its launcher needs."""

    instance: str
    state: Literal["preparing", "active", "ending"]
    reference: str
    operation: str
    created_at: str
    epoch: int
    """Greater than that of any launch before."""
    lease_s: int | None
    lease_expires_at: str | None
    """None also while it is being prepared."""
    boot: AttachmentView | None
    """None until the clone is made."""
    attachments: list[AttachmentView]
    """All of them, boot first."""
    libvirt_xml: str
    qemu_args: list[str]

    @classmethod
    def of(
        cls,
        configuration: Configuration,
        secrets: SecretBox,
        caller: Caller,
        launch: Launch,
        attachments: list[Attachment],
    ) -> Self:
        """Show a launch; `attachments` are its instance's, in order."""
        views = [
            AttachmentView.of(configuration, secrets, caller, attachment, index)
            for index, attachment in enumerate(attachments)
        ]
        return cls(
            instance=launch.instance,
            state=launch.state,
            reference=launch.request["reference"],
            operation=launch.operation_id,
            created_at=launch.created_at,
            epoch=launch.epoch,
            lease_s=launch.lease_s,
            lease_expires_at=launch.lease_expires_at,
            boot=next((view for view in views if view.role == "boot"), None),
            attachments=views,
            libvirt_xml="\n".join(view.libvirt_xml for view in views),
            qemu_args=[argument for view in views for argument in view.qemu_args],
        )


class OperationView(Representation):
    """An operation."""

    id: str
    kind: str
    subject: str
    state: Literal["pending", "running", "done", "failed", "cancelled"]
    progress_bytes: int
    total_bytes: int | None
    rate_bytes_s: float
    """At which progress grew lately."""
    complete_in_s: float | None
    """When it is done at that rate; None when nobody knows."""
    cancel_requested: bool
    owner: str
    created_at: str
    updated_at: str
    request: dict[str, Any]
    result: dict[str, Any] | None
    error: dict[str, Any] | None

    @classmethod
    def of(cls, operation: Operation) -> Self:
        """Show an operation."""
        return cls(
            id=operation.id,
            kind=operation.kind,
            subject=operation.subject,
            state=operation.state,
            progress_bytes=operation.progress_bytes,
            total_bytes=operation.total_bytes,
            rate_bytes_s=0.0 if operation.finished else round(operation.rate_bytes_s, 1),
            complete_in_s=_complete_in_s(operation),
            cancel_requested=operation.cancel_requested,
            owner=operation.owner,
            created_at=operation.created_at,
            updated_at=operation.updated_at,
            request=operation.request,
            result=operation.result,
            error=operation.error,
        )


class EventView(Representation):
    """Something that happened."""

    number: int
    """Greater than that of any event before."""
    at: str
    kind: str
    """Stable and dotted: `disk.created`, `fetch.done`."""
    subject: str
    """The image, disk, snapshot, attachment or instance that it happened to."""
    message: str
    """A sentence for people."""
    owner: str | None
    """Whose the subject was; null = nobody's."""


def _complete_in_s(operation: Operation) -> float | None:
    if operation.finished:
        return 0.0
    if operation.total_bytes is None or not operation.rate_bytes_s:
        return None
    missing_bytes = operation.total_bytes - operation.progress_bytes
    return remaining_s(missing_bytes, operation.rate_bytes_s)
