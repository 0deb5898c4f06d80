"""`/v1/launches`: everything that booting an instance needs, in one request."""

import falcon

from stratocache.api import answers, query
from stratocache.api.attachment_views import LaunchView
from stratocache.api.listing import Listing
from stratocache.api.models import LaunchCreation, LeaseRenewal, read_body
from stratocache.api.service import Service, require_success
from stratocache.cache.errors import NotFound
from stratocache.fs import inventory, launch_intents, leases
from stratocache.fs.records import Caller, Launch, LaunchRequest

LAUNCHES = Listing(
    orders=("created_at", "instance", "state"), filters=("state", "instance"), number="epoch"
)


class LaunchCollection:
    """`/v1/launches`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """List the caller's launches, all for an operator."""
        caller, page = answers.caller(request), LAUNCHES.page(request)
        found = inventory.launches(
            self._service.db, caller, page=page, **LAUNCHES.filters_of(request)
        )
        chosen, after = LAUNCHES.cut(found, page)
        views = [_view(self._service, caller, launch) for launch in chosen]
        answers.show_page(response, "launches", views, after)

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        """Launch: 201 and all connection details, or 202 when that takes longer than `?wait=`."""
        query.require_known(request, "wait")
        wait_s = query.wait_seconds(request, default=query.WAIT_S_MAX)
        wanted = read_body(request, LaunchCreation)
        caller = answers.caller(request)
        launch_request = LaunchRequest(
            reference=wanted.reference,
            instance=wanted.instance,
            size_bytes=wanted.size_bytes,
            disks=wanted.disks,
            readonly=wanted.readonly,
            initiator=wanted.initiator,
            provisional=wanted.provisional,
            lease_s=wanted.lease_s,
        )
        operation = self._service.start(
            launch_intents.request_launch(self._service.db, caller, launch_request), wait_s
        )
        require_success(operation)
        if not operation.finished:
            answers.accept(response, operation)
            return
        launch = inventory.launch(self._service.db, wanted.instance)
        answers.show(
            response,
            _view(self._service, caller, launch),
            created_at=f"/v1/launches/{launch.instance}",
        )


class LaunchItem:
    """`/v1/launches/{instance}`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response, instance: str) -> None:
        """Show one launch, with the same answer as when it was made."""
        query.require_known(request)
        answers.show(response, _shown(self._service, answers.caller(request), instance))

    def on_delete(self, request: falcon.Request, response: falcon.Response, instance: str) -> None:
        """Halt: detach everything, delete what is volatile; 204, or 202 as with disks.

        With `?outcome=failed` what is volatile is kept for a while, in quarantine; with `?epoch=`
        nothing happens to an instance that has been launched anew since.
        """
        query.require_known(request, "wait", "outcome", "epoch")
        wait_s = query.wait_seconds(request, default=60)
        failed = query.choice(request, "outcome", "done", "failed") == "failed"
        epoch, db, caller = query.epoch(request), self._service.db, answers.caller(request)
        with answers.matching(request, db, lambda: _shown(self._service, caller, instance)):
            halting = launch_intents.halt(db, caller, instance, failed=failed, epoch=epoch)
        operation = self._service.start(halting, wait_s)
        answers.finish_removal(response, operation)


class LaunchLease:
    """`/v1/launches/{instance}/lease`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_put(self, request: falcon.Request, response: falcon.Response, instance: str) -> None:
        """Renew the lease, or begin one; shows the launch."""
        query.require_known(request, "epoch")
        wanted = read_body(request, LeaseRenewal)
        epoch, db, caller = query.epoch(request), self._service.db, answers.caller(request)
        with answers.matching(request, db, lambda: _shown(self._service, caller, instance)):
            launch = leases.renew_launch(db, caller, instance, lease_s=wanted.lease_s, epoch=epoch)
        self._service.wake()
        answers.show(response, _view(self._service, caller, launch))


def _shown(service: Service, caller: Caller, instance: str) -> LaunchView:
    launch = inventory.launch(service.db, instance)
    owner = inventory.operation(service.db, launch.operation_id).owner
    if not caller.operator and owner != caller.name:
        raise NotFound("instance-unknown", f"No instance {instance} was launched here.")
    return _view(service, caller, launch)


def _view(service: Service, caller: Caller, launch: Launch) -> LaunchView:
    held = inventory.attachments(service.db, instance=launch.instance)
    return LaunchView.of(service.configuration, service.db.secrets, caller, launch, held)
