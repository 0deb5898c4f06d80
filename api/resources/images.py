"""`/v1/images`: what is cached, fetching, pinning and deleting it."""

import falcon

from stratocache.api import answers, query
from stratocache.api.models import ImageFetch, read_body
from stratocache.api.representations import ImageView, OperationView
from stratocache.api.service import Service, require_success
from stratocache.cache.errors import Internal
from stratocache.fs import intents, inventory
from stratocache.fs.verification import request_verification


class ImageCollection:
    """`/v1/images`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """List images, oldest first; `?state=` chooses."""
        query.require_known(request, "limit", "after", "state")
        state = request.get_param("state")
        found = [
            image
            for image in inventory.images(self._service.db)
            if state is None or image.state == state
        ]
        chosen, after = query.page(request, found, lambda image: f"{image.number:020d}")
        answers.show_page(response, "images", [ImageView.of(image) for image in chosen], after)

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        """Fetch an image: 202 and an operation, or 201 when that ends within `?wait=`."""
        query.require_known(request, "wait")
        wait_s = query.wait_seconds(request, default=0)
        wanted = read_body(request, ImageFetch)
        operation = self._service.start(
            intents.request_fetch(
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
        answers.show(response, ImageView.of(image), created_at=f"/v1/images/{image.id}")


class ImageItem:
    """`/v1/images/{image_id}`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response, image_id: str) -> None:
        """Show one image."""
        query.require_known(request)
        answers.show(response, ImageView.of(inventory.image(self._service.db, image_id)))

    def on_delete(self, request: falcon.Request, response: falcon.Response, image_id: str) -> None:
        """Delete an image that nothing uses: 204, or 202 when that takes longer than `?wait=`."""
        query.require_known(request, "wait")
        wait_s = query.wait_seconds(request, default=60)
        answers.require_match(request, ImageView.of(inventory.image(self._service.db, image_id)))
        operation = self._service.start(
            intents.request_image_deletion(self._service.db, answers.caller(request), image_id),
            wait_s,
        )
        answers.finish_removal(response, operation)


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
        answers.require_match(request, ImageView.of(inventory.image(db, image_id)))
        image = intents.set_pin(db, answers.caller(request), image_id, pinned)
        answers.show(response, ImageView.of(image))


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
        if operation.finished:
            answers.show(response, OperationView.of(operation))
        else:
            answers.accept(response, operation)
