"""`/v1/chunks/{digest}` and `/v1/images/{image_id}/manifest`: what peers read (cache/PEERS.md).

The same resources answer operators on the Unix socket, where nothing is limited.
"""

import re
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import falcon

from stratocache.api import query
from stratocache.cache.errors import InvalidInput, NotFound
from stratocache.fs.records import Caller
from stratocache.fs.rights import require_operator
from stratocache.fs.shared_images import SharedImages

_DIGEST = re.compile(r"[0-9a-f]{64}")
_CHUNK_TYPE = "application/octet-stream"
_MANIFEST_TYPE = "application/vnd.casync.index"


class Ration(Protocol):
    """What peers may take, and what they took."""

    def turn(self) -> AbstractContextManager[None]:
        """Be one of few for the time of a block; raises `Unreachable` (`peer-busy`)."""

    def send(self, size_bytes: int, *, manifest: bool) -> None:
        """Wait until so many bytes may be sent, and count them; raises as `turn`."""

    def missed(self) -> None:
        """Count a request for what is not shared."""


class _Unlimited:
    """The ration of operators."""

    def turn(self) -> AbstractContextManager[None]:
        """Wait for nobody."""
        return nullcontext()

    def send(self, size_bytes: int, *, manifest: bool) -> None:
        """Count nothing."""

    def missed(self) -> None:
        """Count nothing."""


class _Shared:
    """What both resources have."""

    def __init__(self, images: SharedImages, ration: Ration | None = None) -> None:
        self._images = images
        self._ration: Ration = ration or _Unlimited()

    def _check(self, request: falcon.Request, *parameters: str) -> None:
        query.require_known(request, *parameters)
        caller = request.context.caller
        assert isinstance(caller, Caller)
        require_operator(caller)

    def _answer(
        self, response: falcon.Response, content: bytes, media_type: str, *, manifest: bool
    ) -> None:
        self._ration.send(len(content), manifest=manifest)
        response.content_type = media_type
        response.data = content


class ChunkItem(_Shared):
    """`/v1/chunks/{digest}`."""

    def on_get(self, request: falcon.Request, response: falcon.Response, digest: str) -> None:
        """Send the bytes of a chunk; `?image=ID` says of which image it is wanted."""
        self._check(request, "image")
        if not _DIGEST.fullmatch(digest):
            raise InvalidInput(
                "digest-invalid", "A chunk's digest is its SHA-256: 64 hexadecimal digits."
            )
        with self._ration.turn():
            try:
                data = self._images.chunk(bytes.fromhex(digest), request.get_param("image"))
            except NotFound:
                self._ration.missed()
                raise
            self._answer(response, data, _CHUNK_TYPE, manifest=False)


class ImageManifest(_Shared):
    """`/v1/images/{image_id}/manifest`."""

    def on_get(self, request: falcon.Request, response: falcon.Response, image_id: str) -> None:
        """Send the manifest of an image, a casync index."""
        self._check(request)
        with self._ration.turn():
            try:
                content = self._images.manifest(image_id)
            except NotFound:
                self._ration.missed()
                raise
            self._answer(response, content, _MANIFEST_TYPE, manifest=True)
