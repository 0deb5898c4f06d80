"""`/attachments`: which instance has which disk or image."""

import falcon

from stratocache.api import answers
from stratocache.api.pages.rendering import Pages
from stratocache.api.resources.attachments import ATTACHMENTS, attachment_views
from stratocache.fs import inventory


class AttachmentsPage:
    """`/attachments`."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """List the attachments that the caller may see, newest first; `?instance=` chooses."""
        service, caller = self._pages.service, answers.caller(request)
        part, wanted, order = self._pages.part(request, ATTACHMENTS)
        found = inventory.attachment_page(
            service.db, caller, part, disk_uuid=wanted.pop("disk"), image_id=wanted.pop("image"),
            **wanted,
        )  # fmt: skip
        chosen, after = ATTACHMENTS.cut(found, part)
        disks = [inventory.find_disk(service.db, item.disk_uuid or "") for item in chosen]
        images = [inventory.find_image(service.db, item.image_id or "") for item in chosen]
        self._pages.show(
            request, response, "attachments",
            busy=any(item.state != "ready" for item in chosen),
            attachments=attachment_views(service, caller, chosen), next=after,
            order=order, instance=wanted["instance"] or "",
            tags={disk.uuid: disk.tag for disk in disks if disk},
            titles={image.id: image.entry.title or "" for image in images if image},
        )  # fmt: skip
