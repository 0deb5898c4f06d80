"""Images put into a store without any fetch."""

from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.images import ImageStore


def store_image(images: ImageStore, identifier: str, content: bytes) -> None:
    """Publish an image with that content."""
    draft = images.begin()
    draft.add([content[i : i + CHUNK_BYTES] for i in range(0, len(content), CHUNK_BYTES)])
    images.publish(identifier, draft.manifest())
    images.finish(draft)
