"""`/disks`: block devices that somebody owns, how they are reached, and what they were."""

from datetime import UTC, datetime

import falcon

from stratocache.api import answers
from stratocache.api.pages.connection_texts import texts_of
from stratocache.api.pages.rendering import Pages
from stratocache.api.pages.timelines import snapshot_timeline
from stratocache.api.representations import DiskView, OperationView, ShareView, SnapshotView
from stratocache.api.resources.attachments import attachment_views
from stratocache.api.resources.disks import DISKS, disk_details
from stratocache.fs import inventory, shares, space_plan
from stratocache.fs.pages import Page
from stratocache.fs.records import SERVABLE
from stratocache.fs.rights import rights

_PREPARED = ("image", "snapshot", "reference")
"""What the form for a new disk is filled in with."""
_OPERATIONS = (
    "create-disk", "delete-disk", "snapshot", "rollback", "resize", "hydrate", "save", "import",
)  # fmt: skip
_CHOICES_MAX = 100
_ALL = Page(limit=1000)


class DisksPage:
    """`/disks`."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """List the disks that the caller may see, newest first; and make a new one."""
        db, caller = self._pages.service.db, answers.caller(request)
        part, wanted, order = self._pages.part(request, DISKS, *_PREPARED)
        found = inventory.disks(db, caller, page=part, **wanted)
        chosen, after = DISKS.cut(found, part)
        held = inventory.attachments_of(db, chosen)
        views = [DiskView.of(disk, held[disk.uuid]) for disk in chosen]
        newest = inventory.images(db, page=Page(_CHOICES_MAX, descending=True))
        bases = {disk.base_image for disk in chosen if disk.base_image}
        found_bases = [inventory.find_image(db, base) for base in bases]
        prepared = {name: request.get_param(name) or "" for name in _PREPARED}
        self._pages.show(
            request, response, "disks",
            busy=any(view.state != "available" for view in views),
            disks=views, next=after, order=order,
            filters={name: value or "" for name, value in wanted.items()},
            titles={image.id: image.entry.title or "" for image in found_bases if image},
            images=[image for image in newest if image.state in SERVABLE],
            opened=any(prepared.values()), **prepared,
        )  # fmt: skip


class DiskPage:
    """`/disks/{uuid}`."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def on_get(self, request: falcon.Request, response: falcon.Response, uuid: str) -> None:
        """Show one disk, its attachments and its snapshots."""
        service, caller = self._pages.service, answers.caller(request)
        db = service.db
        disk = inventory.disk(db, caller, uuid)
        granted = rights(db, caller, disk)
        attached = attachment_views(service, caller, inventory.attachments(db, disk_uuid=disk.uuid))
        snapshots = [
            SnapshotView.from_record(item)
            for item in inventory.snapshots(db, uuid)
            if not item.transient
        ]
        under_way = inventory.open_operations(db, uuid, *_OPERATIONS)
        unsettled = disk.state != "available" or any(item.state != "ready" for item in attached)
        image = inventory.find_image(db, disk.base_image or "")
        self._pages.show(
            request, response, "disk",
            busy=bool(under_way) or unsettled or any(i.state != "available" for i in snapshots),
            disk=disk_details(db, disk), rights=granted, snapshots=snapshots, attachments=attached,
            texts={item.id: texts_of(service.configuration, item) for item in attached},
            operations=[OperationView.of(item) for item in under_way],
            image_title=(image.entry.title or "") if image else "",
            taken_bytes=space_plan.taken_bytes(service.configuration, disk),
            shares=[ShareView.from_record(share) for share in shares.share_page(db, caller, uuid, _ALL)],
            timeline=snapshot_timeline(snapshots, disk.created_at, datetime.now(UTC)),
        )  # fmt: skip
