"""`/v1/disks/{uuid}/content`: all bytes of a disk, out and in.

Download: GET or HEAD, as `application/octet-stream` (the disk's bytes, `Range` and `If-Range`
understood) or, when `Accept` prefers it or `?format=qcow2` says so, which a link of a page can,
`application/x-qcow2`. The entity tag is strong. With
`?snapshot=ID` it is the disk's snapshot that is sent, which a disk in use does not hinder.

Upload: PUT the whole, or parts one after another with `Content-Range: bytes FIRST-LAST/TOTAL`. What
has arrived stays when a connection is cut: `GET .../content/upload` tells `offset_bytes`, and so
does the `Upload-Offset` of every answer; go on there. A part may leave out zeros: it says with
`Upload-Offset` what is there and begins behind it; an empty part `bytes */TOTAL` says that only
zeros are left. `Upload-Offset: 0` begins anew. With the last byte the content becomes the disk's, in
one step; until then the disk has the old. `Content-Digest` proves a part, `Repr-Digest` in the last
part's request the whole (RFC 9530; sha-256 or sha-512). `Upload-Source` may name what is uploaded;
parts of another source are refused.
"""

import base64
from contextlib import ExitStack
from typing import cast

import falcon

from stratocache.api import answers, query
from stratocache.api.content_headers import MEDIA_TYPES, sent_part, wanted_format, wanted_range
from stratocache.api.representations import Representation
from stratocache.api.service import Service
from stratocache.fs import inventory
from stratocache.fs.content_export import export_qcow2
from stratocache.fs.content_hold import hold_for_reading, hold_snapshot
from stratocache.fs.content_source import Source, disk_tag, open_disk, open_snapshot, sha256_of
from stratocache.fs.content_upload import ContentFormat, Uploads
from stratocache.fs.rights import require_read


class UploadView(Representation):
    """How far an upload is."""

    format: ContentFormat
    offset_bytes: int
    """Where the next part begins."""
    total_bytes: int | None
    source: str
    complete: bool
    """Whether it has become the disk's content."""


class DiskContent:
    """`/v1/disks/{uuid}/content`."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._uploads = Uploads(service.configuration, service.db)

    def on_get(self, request: falcon.Request, response: falcon.Response, uuid: str) -> None:
        """Send the disk's bytes, or a part of them."""
        self._describe(request, response, uuid, send=True)

    def on_head(self, request: falcon.Request, response: falcon.Response, uuid: str) -> None:
        """Tell size and entity tag of the disk's bytes."""
        self._describe(request, response, uuid, send=False)

    def on_put(self, request: falcon.Request, response: falcon.Response, uuid: str) -> None:
        """Take the disk's new content, or a part of it."""
        query.require_known(request)
        caller = answers.caller(request)
        part = sent_part(request)
        terminated = request.env.get("wsgi.input_terminated", False)
        with self._service.transfer(caller):
            upload = self._uploads.receive(
                caller, uuid, part, request.stream if terminated else request.bounded_stream
            )
        answers.show(response, UploadView.from_record(upload))
        response.set_header("Upload-Offset", str(upload.offset_bytes))

    def _describe(
        self, request: falcon.Request, response: falcon.Response, uuid: str, *, send: bool
    ) -> None:
        query.require_known(request, "snapshot", "format")
        chosen = query.choice(request, "format", *MEDIA_TYPES)
        wanted: ContentFormat = cast(ContentFormat, chosen) if chosen else wanted_format(request)
        with ExitStack() as held:
            if send or wanted == "qcow2":
                held.enter_context(self._service.transfer(answers.caller(request)))
            source, etag = self._open(request, uuid, held)
            if wanted == "qcow2":
                source = export_qcow2(self._service.configuration, source)
                held.callback(source.close)
                digest = sha256_of(source)
                response.set_header("Repr-Digest", f"sha-256=:{base64.b64encode(digest).decode()}:")
                etag = digest.hex()[:32]
            part = wanted_range(request, etag, source.size_bytes)
            start, end = part or (0, source.size_bytes)
            if part is not None:
                response.status = 206
                response.content_range = (start, end - 1, source.size_bytes)
            _head(response, uuid, wanted, etag)
            response.content_length = end - start
            if send:
                answers.send(response, source.pieces(start, end), held.pop_all())

    def _open(self, request: falcon.Request, uuid: str, held: ExitStack) -> tuple[Source, str]:
        """Open the disk, or its snapshot that is asked for, and keep it as it is; return its tag."""
        db, configuration = self._service.db, self._service.configuration
        caller, snapshot_id = answers.caller(request), request.get_param("snapshot")
        source: Source
        with db.transaction():
            disk = inventory.disk(db, caller, uuid)
            require_read(db, caller, disk)
            if snapshot_id is None:
                held.enter_context(hold_for_reading(db, disk))
            else:
                snapshot = inventory.snapshot(db, caller, snapshot_id, disk_uuid=uuid)
                held.enter_context(hold_snapshot(db, snapshot))
        if snapshot_id is None:
            etag = disk_tag(configuration, disk)
            source = open_disk(configuration, disk)
        else:
            etag = snapshot.id
            source = open_snapshot(configuration, snapshot)
        held.callback(source.close)
        return source, etag


class DiskUpload:
    """`/v1/disks/{uuid}/content/upload`: what has been uploaded so far."""

    def __init__(self, service: Service) -> None:
        self._uploads = Uploads(service.configuration, service.db)

    def on_get(self, request: falcon.Request, response: falcon.Response, uuid: str) -> None:
        """Tell how far the last upload is, and whether it has become the disk's content."""
        query.require_known(request)
        upload = self._uploads.find(answers.caller(request), uuid)
        answers.show(response, UploadView.from_record(upload))
        response.set_header("Upload-Offset", str(upload.offset_bytes))

    on_head = on_get

    def on_delete(self, request: falcon.Request, response: falcon.Response, uuid: str) -> None:
        """Give an upload up: what has arrived is removed."""
        query.require_known(request)
        self._uploads.abandon(answers.caller(request), uuid)
        response.status = 204


def _head(response: falcon.Response, uuid: str, wanted: ContentFormat, etag: str) -> None:
    suffix = "img" if wanted == "raw" else "qcow2"
    response.content_type = MEDIA_TYPES[wanted]
    response.etag = etag
    response.accept_ranges = "bytes"
    response.vary = "Accept"
    response.downloadable_as = f"{uuid}.{suffix}"
