"""`/v1/disks/{uuid}/attachments`: disks exported over iSCSI to instances."""

from collections.abc import Sequence

import falcon

from stratocache.api import answers, query
from stratocache.api.attachment_views import AttachmentView
from stratocache.api.listing import Listing
from stratocache.api.models import (
    AttachmentCreation,
    LeaseRenewal,
    MigrationCreation,
    read_body,
)
from stratocache.api.service import Service, require_success
from stratocache.cache.errors import NotFound
from stratocache.fs import attachment_intents, inventory, leases, migrations
from stratocache.fs.records import Attachment, Caller, Operation

ATTACHMENTS = Listing(
    orders=("created_at", "instance", "state", "owner"),
    filters=("instance", "disk", "image", "state", "owner"),
)
OF_DISK = Listing(orders=ATTACHMENTS.orders, filters=("instance", "state", "owner"))


class AttachmentOverview:
    """`/v1/attachments`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """List all attachments that the caller may see: own ones, and those of visible disks."""
        _show_list(self._service, ATTACHMENTS, request, response)


class AttachmentCollection:
    """`/v1/disks/{uuid}/attachments`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response, uuid: str) -> None:
        """List a disk's attachments."""
        inventory.disk(self._service.db, answers.caller(request), uuid)
        _show_list(self._service, OF_DISK, request, response, disk_uuid=uuid)

    def on_post(self, request: falcon.Request, response: falcon.Response, uuid: str) -> None:
        """Attach the disk: 201 and how to reach it, or 202 when that takes longer than `?wait=`."""
        query.require_known(request, "wait")
        wait_s = query.wait_seconds(request, default=60)
        wanted = read_body(request, AttachmentCreation)
        caller = answers.caller(request)
        operation = self._service.start(
            attachment_intents.attach(
                self._service.db,
                caller,
                uuid,
                instance=wanted.instance,
                access=wanted.access,
                initiator=wanted.initiator,
                lease_s=wanted.lease_s,
            ),
            wait_s,
        )
        _show_made(self._service, caller, response, operation)


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
        """Detach: 204, or 202 when that takes longer than `?wait=`.

        With `?force=true` an event proves that no session is left; with `?epoch=` nothing happens
        to an attachment of another epoch.
        """
        query.require_known(request, "wait", "force", "epoch")
        wait_s = query.wait_seconds(request, default=60)
        caller = answers.caller(request)
        force = query.choice(request, "force", "false", "true") == "true"
        epoch, db = query.epoch(request), self._service.db
        self._find(caller, uuid, attachment_id)
        with answers.matching(request, db, lambda: self._shown(caller, uuid, attachment_id)):
            detachment = attachment_intents.detach(
                db, caller, attachment_id, epoch=epoch, force=force
            )
        answers.finish_removal(response, self._service.start(detachment, wait_s))

    def on_post_migrate(
        self, request: falcon.Request, response: falcon.Response, uuid: str, attachment_id: str
    ) -> None:
        """Attach the disk a second time, to who takes over: 201 or 202 as when attaching."""
        query.require_known(request, "wait", "epoch")
        wait_s = query.wait_seconds(request, default=60)
        wanted = read_body(request, MigrationCreation)
        caller = answers.caller(request)
        self._find(caller, uuid, attachment_id)
        operation = self._service.start(
            migrations.migrate(
                self._service.db,
                caller,
                attachment_id,
                instance=wanted.instance,
                initiator=wanted.initiator,
                timeout_s=wanted.timeout_s,
                epoch=query.epoch(request),
            ),
            wait_s,
        )
        _show_made(self._service, caller, response, operation)

    def on_post_complete(
        self, request: falcon.Request, response: falcon.Response, uuid: str, attachment_id: str
    ) -> None:
        """Cut the first attachment off: 200 and the one that holds the disk now, or 202."""
        query.require_known(request, "wait", "epoch")
        wait_s = query.wait_seconds(request, default=60)
        caller = answers.caller(request)
        self._find(caller, uuid, attachment_id)
        operation = migrations.complete(
            self._service.db, caller, attachment_id, epoch=query.epoch(request)
        )
        if operation is not None:
            operation = self._service.start(operation, wait_s)
            require_success(operation)
            if not operation.finished:
                answers.accept(response, operation)
                return
        attachment = self._find(caller, uuid, attachment_id)
        answers.show(response, _view(self._service, caller, attachment))

    def on_put_lease(
        self, request: falcon.Request, response: falcon.Response, uuid: str, attachment_id: str
    ) -> None:
        """Renew the lease, or begin one; shows the attachment."""
        query.require_known(request, "epoch")
        wanted = read_body(request, LeaseRenewal)
        caller = answers.caller(request)
        epoch, db = query.epoch(request), self._service.db
        self._find(caller, uuid, attachment_id)
        with answers.matching(request, db, lambda: self._shown(caller, uuid, attachment_id)):
            attachment = leases.renew_attachment(
                db, caller, attachment_id, lease_s=wanted.lease_s, epoch=epoch
            )
        self._service.wake()
        answers.show(response, _view(self._service, caller, attachment))

    def _shown(self, caller: Caller, uuid: str, attachment_id: str) -> AttachmentView:
        return _view(self._service, caller, self._find(caller, uuid, attachment_id))

    def _find(self, caller: Caller, uuid: str, attachment_id: str) -> Attachment:
        attachment = inventory.attachment(self._service.db, attachment_id)
        if attachment.disk_uuid != uuid:
            raise NotFound("attachment-unknown", f"Disk {uuid} has no attachment {attachment_id}.")
        if attachment.owner != caller.name:
            inventory.disk(self._service.db, caller, uuid)  # raises unless it may be seen
        return attachment


def _show_made(
    service: Service, caller: Caller, response: falcon.Response, operation: Operation
) -> None:
    require_success(operation)
    if not operation.finished:
        answers.accept(response, operation)
        return
    attachment = inventory.attachment(service.db, operation.subject)
    answers.show(
        response,
        _view(service, caller, attachment),
        created_at=f"/v1/disks/{attachment.disk_uuid}/attachments/{attachment.id}",
    )


def _show_list(
    service: Service,
    listing: Listing,
    request: falcon.Request,
    response: falcon.Response,
    disk_uuid: str | None = None,
) -> None:
    page, wanted = listing.page(request), listing.filters_of(request)
    caller = answers.caller(request)
    found = inventory.attachment_page(
        service.db, caller, page,
        disk_uuid=disk_uuid or wanted.pop("disk", None), image_id=wanted.pop("image", None), **wanted,
    )  # fmt: skip
    chosen, after = listing.cut(found, page)
    answers.show_page(response, "attachments", attachment_views(service, caller, chosen), after)


def _view(service: Service, caller: Caller, attachment: Attachment) -> AttachmentView:
    return attachment_views(service, caller, [attachment])[0]


def attachment_views(
    service: Service, caller: Caller, attachments: Sequence[Attachment]
) -> list[AttachmentView]:
    """Return how a caller sees attachments: who may not log in is not told the secret."""
    places = inventory.places(service.db, attachments)
    return [
        AttachmentView.of(
            service.configuration, service.db.secrets, caller, item, places.get(item.id, 0)
        )
        for item in attachments
    ]
