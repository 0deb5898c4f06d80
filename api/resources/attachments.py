"""`/v1/disks/{uuid}/attachments`: disks exported over iSCSI to instances."""

import falcon

from stratocache.api import answers, query
from stratocache.api.models import AttachmentCreation, read_body
from stratocache.api.representations import AttachmentView
from stratocache.api.service import Service, require_success
from stratocache.cache.errors import NotFound
from stratocache.fs import intents, inventory
from stratocache.fs.records import Attachment, Caller


class AttachmentCollection:
    """`/v1/disks/{uuid}/attachments`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response, uuid: str) -> None:
        """List a disk's attachments."""
        query.require_known(request, "limit", "after")
        caller = answers.caller(request)
        inventory.disk(self._service.db, caller, uuid)
        found = inventory.attachments(self._service.db, disk_uuid=uuid)
        chosen, after = query.page(request, found, lambda item: f"{item.number:020d}")
        views = [_view(self._service, caller, attachment) for attachment in chosen]
        answers.show_page(response, "attachments", views, after)

    def on_post(self, request: falcon.Request, response: falcon.Response, uuid: str) -> None:
        """Attach the disk: 201 and how to reach it, or 202 when that takes longer than `?wait=`."""
        query.require_known(request, "wait")
        wait_s = query.wait_seconds(request, default=60)
        wanted = read_body(request, AttachmentCreation)
        caller = answers.caller(request)
        operation = self._service.start(
            intents.attach(
                self._service.db,
                caller,
                uuid,
                instance=wanted.instance,
                access=wanted.access,
                initiator=wanted.initiator,
            ),
            wait_s,
        )
        require_success(operation)
        if not operation.finished:
            answers.accept(response, operation)
            return
        attachment = inventory.attachment(self._service.db, operation.subject)
        answers.show(
            response,
            _view(self._service, caller, attachment),
            created_at=f"/v1/disks/{uuid}/attachments/{attachment.id}",
        )


class AttachmentItem:
    """`/v1/disks/{uuid}/attachments/{attachment_id}`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(
        self, request: falcon.Request, response: falcon.Response, uuid: str, attachment_id: str
    ) -> None:
        """Show one attachment and how to reach it."""
        query.require_known(request)
        caller = answers.caller(request)
        attachment = self._find(caller, uuid, attachment_id)
        answers.show(response, _view(self._service, caller, attachment))

    def on_delete(
        self, request: falcon.Request, response: falcon.Response, uuid: str, attachment_id: str
    ) -> None:
        """Detach: 204, or 202 when that takes longer than `?wait=`."""
        query.require_known(request, "wait")
        wait_s = query.wait_seconds(request, default=60)
        caller = answers.caller(request)
        self._find(caller, uuid, attachment_id)
        operation = self._service.start(
            intents.detach(self._service.db, caller, attachment_id), wait_s
        )
        answers.finish_removal(response, operation)

    def _find(self, caller: Caller, uuid: str, attachment_id: str) -> Attachment:
        attachment = inventory.attachment(self._service.db, attachment_id)
        if attachment.disk_uuid != uuid:
            raise NotFound("attachment-unknown", f"Disk {uuid} has no attachment {attachment_id}.")
        if attachment.owner != caller.name:
            inventory.disk(self._service.db, caller, uuid)  # raises unless it may be seen
        return attachment


def _view(service: Service, caller: Caller, attachment: Attachment) -> AttachmentView:
    siblings = inventory.attachments(service.db, instance=attachment.instance)
    index = sum(sibling.number < attachment.number for sibling in siblings)
    return AttachmentView.of(service.configuration, caller, attachment, index)
