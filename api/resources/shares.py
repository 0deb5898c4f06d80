"""`/v1/disks/{uuid}/shares`: who else may use a disk."""

import falcon

from stratocache.api import answers, query
from stratocache.api.listing import Listing
from stratocache.api.models import ShareChange, check_user_name, read_body
from stratocache.api.representations import ShareView
from stratocache.api.service import Service
from stratocache.fs import shares

SHARES = Listing(orders=("created_at", "user", "access"))


class ShareCollection:
    """`/v1/disks/{uuid}/shares`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response, uuid: str) -> None:
        """List who shares a disk; those who share it see themselves only."""
        page = SHARES.page(request)
        found = shares.share_page(self._service.db, answers.caller(request), uuid, page)
        chosen, after = SHARES.cut(found, page)
        views = [ShareView.from_record(share) for share in chosen]
        answers.show_page(response, "shares", views, after)


class ShareItem:
    """`/v1/disks/{uuid}/shares/{user}`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_put(
        self, request: falcon.Request, response: falcon.Response, uuid: str, user: str
    ) -> None:
        """Share a disk with a user, to read or to write: 201, or 200 when it was shared before."""
        query.require_known(request)
        wanted = read_body(request, ShareChange)
        check_user_name(user)
        share, is_new = shares.share(
            self._service.db, answers.caller(request), uuid, user, wanted.access
        )
        address = f"/v1/disks/{uuid}/shares/{user}" if is_new else None
        answers.show(response, ShareView.from_record(share), created_at=address)

    def on_delete(
        self, request: falcon.Request, response: falcon.Response, uuid: str, user: str
    ) -> None:
        """End a share, as the disk's owner or who it is for: 204."""
        query.require_known(request)
        shares.unshare(self._service.db, answers.caller(request), uuid, user)
        response.status = 204
