"""What responses carry about attachments and launches, and how to reach what is attached."""

from typing import Literal, Self

from stratocache.api import connection_details
from stratocache.api.representations import Representation
from stratocache.cache.configuration import Configuration
from stratocache.fs.records import Attachment, Caller, Launch
from stratocache.fs.secret_box import SecretBox
from stratocache.fs.target import LUN


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
        return cls.from_record(
            attachment,
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
        return cls.from_record(
            launch,
            reference=launch.request["reference"],
            operation=launch.operation_id,
            boot=next((view for view in views if view.role == "boot"), None),
            attachments=views,
            libvirt_xml="\n".join(view.libvirt_xml for view in views),
            qemu_args=[argument for view in views for argument in view.qemu_args],
        )
