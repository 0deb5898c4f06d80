"""`/images`: what is cached, fetching more, and everything that is known of one image."""

from dataclasses import dataclass

import falcon
from markupsafe import Markup

from stratocache.api import answers
from stratocache.api.image_views import ImageDetails
from stratocache.api.pages.pictures import map_strip, meter, sparkline
from stratocache.api.pages.rendering import Pages
from stratocache.api.pages.timelines import lineage_tree
from stratocache.api.plots import periods
from stratocache.api.representations import OperationView
from stratocache.api.resources.images import IMAGES, image_details
from stratocache.cache import bootset
from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.errors import NotVerified
from stratocache.fs import fetch_account, inventory, local_map
from stratocache.fs.records import Image

_CELLS = 128
_OPERATIONS = ("fetch", "verify-image", "delete-image", "evict")


@dataclass(frozen=True, slots=True)
class _Row:
    image: Image
    share: float | None
    """Of it that is here."""
    here: Markup


class ImagesPage:
    """`/images`."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """List images, newest first; `?state=` chooses."""
        service = self._pages.service
        part, wanted, order = self._pages.part(request, IMAGES)
        found = inventory.images(service.db, state=wanted["state"], page=part)
        chosen, after = IMAGES.cut(found, part)
        self._pages.show(
            request, response, "images",
            busy=any(image.state in ("fetching", "provisional", "deleting") for image in chosen),
            rows=[self._row(image) for image in chosen], next=after, order=order,
            state=wanted["state"] or "",
            catalogues=sorted(service.configuration.catalogues),
        )  # fmt: skip

    def _row(self, image: Image) -> _Row:
        account = fetch_account.of_image(self._pages.service.db, image)
        size_bytes = image.size_bytes or image.entry.size_bytes
        here_bytes = account.local_bytes or 0
        name = f"What is here of {image.entry.title or image.id}"
        share = here_bytes / size_bytes if size_bytes else None
        return _Row(image, share, meter(name, here_bytes, size_bytes))


class ImagePage:
    """`/images/{image_id}`."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def on_get(self, request: falcon.Request, response: falcon.Response, image_id: str) -> None:
        """Show one image."""
        service, caller = self._pages.service, answers.caller(request)
        image = inventory.image(service.db, image_id)
        view = image_details(service, caller, image, _CELLS)
        under_way = inventory.open_operations(service.db, image.id, *_OPERATIONS)
        boot = self._boot_set(view)
        waits = periods([item.model_dump() for item in view.traffic_history], "remote_bytes")
        name = view.entry.title or view.id
        self._pages.show(
            request, response, "image",
            busy=bool(under_way) or image.state in ("fetching", "provisional", "deleting"),
            image=view, boot_bytes=len(boot) * CHUNK_BYTES,
            operations=[OperationView.of(item) for item in under_way],
            map_picture=map_strip(view.local_map or [], _spread(boot, view.size_bytes or 0)),
            traffic_picture=sparkline(f"Bytes fetched of {name} over time", waits),
            lineage_picture=lineage_tree(name, view.disks) if view.disks else "",
        )  # fmt: skip

    def _boot_set(self, view: ImageDetails) -> list[int]:
        path = self._pages.service.configuration.state_dir / "bootsets" / view.id
        try:
            return bootset.decode(bootset.read(path), view.size_bytes or 0)
        except (FileNotFoundError, NotVerified):
            return []


def _spread(boot: list[int], size_bytes: int) -> list[float]:
    """Return the share of each cell's chunks that a boot reads."""
    chunk_count = -(-size_bytes // CHUNK_BYTES)
    if not boot or not chunk_count:
        return []
    read = set(boot)
    return [
        sum(index in read for index in indexes) / max(1, len(indexes))
        for indexes in local_map.cell_chunks(chunk_count, _CELLS)
    ]
