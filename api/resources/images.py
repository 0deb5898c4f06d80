"""`/v1/images`: what is cached, fetching, pinning and deleting it."""

from pathlib import Path

import falcon

from stratocache.api import answers, query
from stratocache.api.image_views import ImageDetails, ImageView
from stratocache.api.listing import Listing
from stratocache.api.models import ImageFetch, read_body
from stratocache.api.service import Service, require_success
from stratocache.cache import bootset
from stratocache.cache.errors import Internal, NotFound
from stratocache.fs import fetch_account, image_intents, inventory, local_map, rights
from stratocache.fs.lineage import lineage_of
from stratocache.fs.records import Caller, Image
from stratocache.fs.verification import request_verification

IMAGES = Listing(
    orders=("created_at", "id", "size_bytes", "last_used_at", "state"), filters=("state",)
)


class ImageCollection:
    """`/v1/images`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """List images."""
        page = IMAGES.page(request)
        found = inventory.images(self._service.db, page=page, **IMAGES.filters_of(request))
        chosen, after = IMAGES.cut(found, page)
        views = [ImageView.from_record(image) for image in chosen]
        answers.show_page(response, "images", views, after)

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        """Fetch an image: 202 and an operation, or 201 when that ends within `?wait=`."""
        query.require_known(request, "wait")
        wait_s = query.wait_seconds(request, default=0)
        wanted = read_body(request, ImageFetch)
        operation = self._service.start(
            image_intents.request_fetch(
                self._service.db, answers.caller(request), wanted.reference, pin=wanted.pin
            ),
            wait_s,
        )
        require_success(operation)
        if not operation.finished:
            answers.accept(response, operation)
            return
        if operation.result is None or "image" not in operation.result:
            raise Internal("internal", f"Operation {operation.id} names no image.")
        image = inventory.image(self._service.db, operation.result["image"])
        address = f"/v1/images/{image.id}"
        view = image_details(self._service, answers.caller(request), image)
        answers.show(response, view, created_at=address)


class ImageItem:
    """`/v1/images/{image_id}`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response, image_id: str) -> None:
        """Show one image, what it cost to fetch, and what was made of it; with `?map=N` which of N
        equal parts are here."""
        query.require_known(request, "map")
        cells = query.whole_number(request, "map", local_map.CELLS_MAX)
        image = inventory.image(self._service.db, image_id)
        answers.show(response, image_details(self._service, answers.caller(request), image, cells))

    def on_delete(self, request: falcon.Request, response: falcon.Response, image_id: str) -> None:
        """Delete an image that nothing uses: 204, or 202 when that takes longer than `?wait=`."""
        query.require_known(request, "wait")
        wait_s = query.wait_seconds(request, default=60)
        db, caller = self._service.db, answers.caller(request)
        with answers.matching(
            request, db, lambda: ImageView.from_record(inventory.image(db, image_id))
        ):
            deletion = image_intents.request_image_deletion(db, caller, image_id)
        operation = self._service.start(deletion, wait_s)
        answers.finish_removal(response, operation)


class ImageBootSet:
    """`/v1/images/{image_id}/bootset`: the chunks that a boot reads, in order."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response, image_id: str) -> None:
        """Answer with the boot set, as it lies beside an index for other hosts."""
        query.require_known(request)
        image = inventory.image(self._service.db, image_id)
        try:
            content = bootset.read(self._path(image.id))
        except FileNotFoundError:
            raise NotFound(
                "bootset-unknown", f"Nobody has booted image {image_id} here yet."
            ) from None
        bootset.decode(content, image.size_bytes or 0)
        response.content_type = falcon.MEDIA_JSON
        response.data = content

    def on_put(self, request: falcon.Request, response: falcon.Response, image_id: str) -> None:
        """Take a boot set from elsewhere: 204."""
        query.require_known(request)
        rights.require_operator(answers.caller(request))
        image = inventory.image(self._service.db, image_id)
        content = request.bounded_stream.read(bootset.BYTES_MAX + 1)
        indexes = bootset.decode(content, image.size_bytes or 0)
        bootset.write(self._path(image.id), bootset.encode(indexes, image.size_bytes or 0))
        response.status = 204

    def _path(self, image_id: str) -> Path:
        return self._service.configuration.state_dir / "bootsets" / image_id


class ImagePin:
    """`/v1/images/{image_id}/pin`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_put(self, request: falcon.Request, response: falcon.Response, image_id: str) -> None:
        """Never evict the image."""
        self._set(request, response, image_id, pinned=True)

    def on_delete(self, request: falcon.Request, response: falcon.Response, image_id: str) -> None:
        """Let the image be evicted again."""
        self._set(request, response, image_id, pinned=False)

    def _set(
        self, request: falcon.Request, response: falcon.Response, image_id: str, *, pinned: bool
    ) -> None:
        query.require_known(request)
        db = self._service.db
        caller = answers.caller(request)
        with answers.matching(
            request, db, lambda: ImageView.from_record(inventory.image(db, image_id))
        ):
            image = image_intents.set_pin(db, caller, image_id, pinned)
        answers.show(response, image_details(self._service, caller, image))


class ImageVerification:
    """`/v1/images/{image_id}/verify`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_post(self, request: falcon.Request, response: falcon.Response, image_id: str) -> None:
        """Hash every chunk and the whole, and fetch again what is damaged or missing: 202 and an
        operation, or 200 when that ends within `?wait=`."""
        query.require_known(request, "wait")
        wait_s = query.wait_seconds(request, default=0)
        operation = self._service.start(
            request_verification(self._service.db, answers.caller(request), image_id), wait_s
        )
        require_success(operation)
        answers.show_work(response, operation)


def image_details(
    service: Service, caller: Caller, image: Image, cells: int | None = None
) -> ImageDetails:
    """Return what a caller may know of an image; with `cells` which of so many parts are here."""
    db, state_dir = service.db, service.configuration.state_dir
    account = fetch_account.of_image(db, image)
    held = inventory.attachments(db, image_id=image.id) if caller.operator else []
    return ImageDetails.with_account(
        image, account, lineage_of(db, caller, image.id), [item.instance for item in held],
        shared_bytes=service.sharing.shared_bytes(image.id),
        local_map=None if cells is None else local_map.local_map(state_dir, image, cells),
    )  # fmt: skip
