"""`/v1/disks`: block devices that somebody owns."""

from collections import defaultdict

import falcon

from stratocache.api import answers, query
from stratocache.api.models import DiskChange, DiskCreation, read_body
from stratocache.api.representations import DiskView
from stratocache.api.service import Service, require_success
from stratocache.fs import intents, inventory
from stratocache.fs.records import Attachment, Caller, DiskRequest


class DiskCollection:
    """`/v1/disks`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """List the disks that the caller may see; `?state=`, `?tag=` and `?owner=` choose."""
        query.require_known(request, "limit", "after", "state", "tag", "owner")
        state, tag, owner = (request.get_param(name) for name in ("state", "tag", "owner"))
        found = [
            disk
            for disk in inventory.disks(self._service.db, answers.caller(request))
            if (state is None or disk.state == state)
            and (tag is None or disk.tag == tag)
            and (owner is None or disk.owner == owner)
        ]
        chosen, after = query.page(request, found, lambda disk: f"{disk.number:020d}")
        held: defaultdict[str | None, list[Attachment]] = defaultdict(list)
        for attachment in inventory.attachments(self._service.db):
            held[attachment.disk_uuid].append(attachment)
        views = [DiskView.of(disk, held[disk.uuid]) for disk in chosen]
        answers.show_page(response, "disks", views, after)

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        """Create a disk: 201, or 202 and an operation when that takes longer than `?wait=`."""
        query.require_known(request, "wait")
        wait_s = query.wait_seconds(request, default=60)
        wanted = read_body(request, DiskCreation)
        caller = answers.caller(request)
        disk_request = DiskRequest(
            size_bytes=wanted.size_bytes,
            reference=wanted.reference,
            tag=wanted.tag,
            visibility=wanted.visibility,
            kind=wanted.kind,
            volatile=wanted.volatile,
        )
        operation = self._service.start(
            intents.create_disk(self._service.db, caller, disk_request), wait_s
        )
        require_success(operation)
        if not operation.finished:
            answers.accept(response, operation)
            return
        view = _view(self._service, caller, operation.subject)
        answers.show(response, view, created_at=f"/v1/disks/{view.uuid}")


class DiskItem:
    """`/v1/disks/{uuid}`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response, uuid: str) -> None:
        """Show one disk."""
        query.require_known(request)
        answers.show(response, _view(self._service, answers.caller(request), uuid))

    def on_patch(self, request: falcon.Request, response: falcon.Response, uuid: str) -> None:
        """Change tag, visibility or owner."""
        query.require_known(request)
        wanted = read_body(request, DiskChange)
        caller = answers.caller(request)
        answers.require_match(request, _view(self._service, caller, uuid))
        changed = intents.update_disk(
            self._service.db,
            caller,
            uuid,
            tag=wanted.tag,
            visibility=wanted.visibility,
            owner=wanted.owner,
        )
        held = inventory.attachments(self._service.db, disk_uuid=uuid)
        answers.show(response, DiskView.of(changed, held))

    def on_delete(self, request: falcon.Request, response: falcon.Response, uuid: str) -> None:
        """Delete a disk that is not attached: 204, or 202 when that takes longer than `?wait=`."""
        query.require_known(request, "wait")
        wait_s = query.wait_seconds(request, default=60)
        caller = answers.caller(request)
        answers.require_match(request, _view(self._service, caller, uuid))
        operation = self._service.start(intents.delete_disk(self._service.db, caller, uuid), wait_s)
        answers.finish_removal(response, operation)


def _view(service: Service, caller: Caller, uuid: str) -> DiskView:
    disk = inventory.disk(service.db, caller, uuid)
    return DiskView.of(disk, inventory.attachments(service.db, disk_uuid=uuid))
