"""What other hosts may have of this one's cache: chunks and manifests of images of catalogues.

A chunk is given away only if an image that came from a catalogue has it: what was written on this
host, in snapshots and saved images, stays here, though its digest were known. Nothing is fetched for
a peer, so no request goes in circles. Methods block and may run in any thread.
"""

import hashlib
import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass

from stratocache.cache import seals
from stratocache.cache.chunk_file import read_chunk
from stratocache.cache.configuration import Configuration
from stratocache.cache.entry import LOCAL_CATALOGUE
from stratocache.cache.errors import NotFound, NotVerified
from stratocache.cache.manifest import Manifest
from stratocache.fs import inventory
from stratocache.fs.records import SERVABLE, Image
from stratocache.fs.state import Database

log = logging.getLogger(__name__)

_MANIFEST_BYTES_MAX = 64 * 1024**2
"""Of digests that are kept in memory, those of the image last asked for in any case."""


@dataclass(frozen=True)
class _Known:
    """A manifest as it was read."""

    stamp: tuple[int, int]
    manifest: Manifest


class SharedImages:
    """What may be given away of one state directory."""

    def __init__(self, configuration: Configuration, db: Database) -> None:
        self._state_dir = configuration.state_dir
        self._db = db
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._lock = threading.Lock()

    def manifest(self, image_id: str) -> bytes:
        """Return the `.caibx` file of an image that is proven.

        Either the whole is, or the file itself is the endorsed one. Raises `NotFound`
        (`image-unknown`).
        """
        image = self._image(image_id)
        content = self._manifest(image_id).to_bytes()
        index = image.entry.index
        endorsed = index is not None and hashlib.sha256(content).hexdigest() == index.sha256
        if image.state != "verified" and not endorsed:
            raise _unknown_image(image_id)
        return content

    def chunk(self, digest: bytes, image_id: str | None) -> bytes:
        """Return a chunk, verified; it is looked for in `image_id`, or in all images.

        Raises `NotFound`: `image-unknown` when nothing is here of the image that is named,
        `chunk-unknown`.
        """
        if image_id is not None:
            self._image(image_id)
        try:
            data = read_chunk(self._state_dir, digest)
        except NotVerified as error:
            if error.code != "chunk-missing":
                log.error("%s; the scrubber repairs it", error.message)
            raise _unknown_chunk(digest) from None
        if not self._is_shared(digest, image_id):
            raise _unknown_chunk(digest)
        return data

    def _is_shared(self, digest: bytes, image_id: str | None) -> bool:
        if image_id is not None and self._has(image_id, digest):
            return True
        images = inventory.images(self._db)
        return any(self._has(image.id, digest) for image in images if _may_be_shared(image))

    def _has(self, image_id: str, digest: bytes) -> bool:
        try:
            return self._manifest(image_id).index_of(digest) is not None
        except NotFound:
            return False

    def _image(self, image_id: str) -> Image:
        image = inventory.find_image(self._db, image_id)
        if image is None or not _may_be_shared(image):
            raise _unknown_image(image_id)
        return image

    def _manifest(self, image_id: str) -> Manifest:
        """Return the manifest of an image that the state names; it is read when it has changed."""
        try:
            found = seals.manifest_path(self._state_dir, image_id).stat()
            stamp = (found.st_ino, found.st_ctime_ns)
            with self._lock:
                known = self._known.get(image_id)
                if known is not None and known.stamp == stamp:
                    self._known.move_to_end(image_id)
                    return known.manifest
            manifest = seals.read_manifest(self._state_dir, image_id)
        except (OSError, NotVerified) as error:
            log.warning("manifest of %s: %s", image_id, error)
            raise _unknown_image(image_id) from None
        self._keep(image_id, _Known(stamp, manifest))
        return manifest

    def _keep(self, image_id: str, known: _Known) -> None:
        with self._lock:
            self._known[image_id] = known
            self._known.move_to_end(image_id)
            kept_bytes = sum(len(item.manifest.digests) for item in self._known.values())
            while kept_bytes > _MANIFEST_BYTES_MAX and len(self._known) > 1:
                _, dropped = self._known.popitem(last=False)
                kept_bytes -= len(dropped.manifest.digests)


def _may_be_shared(image: Image) -> bool:
    return image.state in SERVABLE and image.entry.catalogue != LOCAL_CATALOGUE


def _unknown_image(image_id: str) -> NotFound:
    return NotFound("image-unknown", f"Nothing of image {image_id[:80]} is shared here.")


def _unknown_chunk(digest: bytes) -> NotFound:
    return NotFound("chunk-unknown", f"Chunk {digest.hex()} is not shared here.")
