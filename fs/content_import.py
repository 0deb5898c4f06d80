"""Imports: a file of an HTTP(S) server becomes a new disk.

transfers/import-UUID/source.part, source.json     the file as served (`cache.stage`)
transfers/import-UUID/container, image             decompressed qcow2; the raw disk

`fetch` downloads and verifies the file as served, decompresses and converts it; `install` makes the
raw file that it left a disk's, in one step; `discard` ends it. Each may be done again after a
crash: a download goes on where it stopped. `stratocache.fs.importing` is who does all three.
"""

import os
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

import httpx
import trio

from stratocache.cache import conversion
from stratocache.cache.configuration import Configuration
from stratocache.cache.decompression import decompressed
from stratocache.cache.errors import InvalidInput, NotFound, NotVerified, StratocacheError
from stratocache.cache.ingestion import Batch, chunks_of, ingest
from stratocache.cache.origin import Backoff, HttpOrigin, Progress, SizeLimit
from stratocache.cache.room import CacheSpace
from stratocache.cache.space import full_disk_is_no_space
from stratocache.cache.stage import Stage
from stratocache.fs import transfers
from stratocache.fs.disks import DiskStore
from stratocache.fs.import_intents import ImportRequest
from stratocache.fs.records import DiskForm
from stratocache.fs.sparse_file import write_sparse
from stratocache.fs.storage import FILES

_SECTOR_BYTES = 512
_DISK_BYTES_MIN = 1024**2


class Importer:
    """Imports of one host. The caller makes sure that one disk is imported once at a time."""

    def __init__(
        self,
        configuration: Configuration,
        client: httpx.AsyncClient,
        *,
        backoff: Backoff | None = None,
    ) -> None:
        self._configuration = configuration
        self._image_bytes_max = configuration.fetch.max_image_bytes
        self._space = CacheSpace(configuration.state_dir, configuration.space.reserve_bytes)
        self._http = HttpOrigin(client, configuration.fetch, self._space, backoff or Backoff())
        self._limiter = trio.CapacityLimiter(2 * (os.cpu_count() or 1) + 2)

    async def fetch(self, uuid: str, request: ImportRequest, progress: Progress) -> int:
        """Make the content of a disk-to-be ready; return the size that the disk must have.

        `progress(done, total)` counts the bytes of the download. On failure nothing is left; when
        cancelled the download stays, until `discard`. Raises `InvalidInput` (as `check`, and
        `size-too-small`), `NotFound` (`location-not-found`), `Refused` (`location-refused`),
        `OriginFailed` (`origin-failed`), `NoSpace` (`no-space`), `NotVerified` (`size-mismatch`,
        `digest-mismatch`, `decompression-bomb`, `source-truncated`, `source-corrupt`,
        `image-format`, `image-backing-file`, `image-too-large`).
        """
        request.check()
        stage = self._stage(uuid)
        if stage.image.exists():
            return _disk_bytes(request, stage.image.stat().st_size)
        limit_bytes = self._image_bytes_max
        if request.chosen_compression() != "none" or request.chosen_format() == "qcow2":
            limit_bytes += limit_bytes // 10
        limit = SizeLimit(limit_bytes, exact=False)
        try:
            continued = await self._http.download(request.url, stage, limit, progress)
            try:
                return await self._make(stage, request)
            except NotVerified:
                if not continued:
                    raise
            # the parts may be of two files, or hurt by a power cut; the whole may still be right
            await trio.to_thread.run_sync(stage.remove)
            await self._http.download(request.url, stage, limit, progress)
            return await self._make(stage, request)
        except (StratocacheError, OSError):
            await trio.to_thread.run_sync(stage.remove)
            raise

    def install(self, disks: DiskStore, uuid: str, size_bytes: int) -> DiskForm:
        """Make what `fetch` left a disk's file, durably, until `discard` once more. Blocks.

        Asked again it changes nothing; the disk must not be in use before `discard`. Raises
        `NotFound` (`import-missing`) when nothing was fetched.
        """
        image = self._stage(uuid).image
        if not image.exists():
            raise NotFound("import-missing", f"Nothing was imported for disk {uuid}.")
        os.truncate(image, size_bytes)
        with image.open("rb") as file:
            os.fsync(file.fileno())
        form = disks.create_blank(uuid, size_bytes)
        # a link: until the disk has its row, a start of `blockd` removes its files, not these
        linked = image.with_name("linked")
        linked.unlink(missing_ok=True)
        linked.hardlink_to(image)
        linked.rename(disks.data_path(uuid))
        linked.unlink(missing_ok=True)  # rename(2) of two names of one file does nothing
        FILES.sync_directory(disks.data_path(uuid).parent)
        return form

    def discard(self, uuid: str) -> None:
        """Remove what an import left; nothing there is fine. Blocks."""
        self._stage(uuid).remove()

    def _stage(self, uuid: str) -> Stage:
        parent = transfers.transfers_directory(self._configuration)
        return Stage(parent / f"{transfers.IMPORT}{uuid}")

    async def _make(self, stage: Stage, request: ImportRequest) -> int:
        """Verify what was downloaded, and make `stage.image` of it; the download goes."""
        fresh = stage.directory / "image.new"
        with closing(await trio.to_thread.run_sync(_open, stage.source)) as source:
            await self._verify(source, request)
            source.seek(0)
            packed = request.chosen_compression() != "none"
            if request.chosen_format() == "raw":
                await self._decompress(source, request, fresh)
            elif packed:
                await self._decompress(source, request, stage.container)
        if request.chosen_format() == "qcow2":
            await self._convert(stage.container if packed else stage.source, fresh)
        size_bytes = _disk_bytes(request, fresh.stat().st_size)
        fresh.rename(stage.image)
        stage.container.unlink(missing_ok=True)
        stage.source.unlink()
        return size_bytes

    async def _verify(self, source: BinaryIO, request: ImportRequest) -> None:
        expected = request.digests()
        if not expected:
            return
        limit = NotVerified("size-mismatch", "The file grew while it was read.")
        size_bytes = os.fstat(source.fileno()).st_size
        _, found = await ingest(
            chunks_of(source, size_bytes, overlong=limit), (), expected,
            limiter=self._limiter, progress=_no_progress,
        )  # fmt: skip
        for name, digest in expected.items():
            if found[name] != digest.lower():
                raise NotVerified(
                    "digest-mismatch",
                    f"The {name} of {request.url[:200]} is {found[name]}, not {digest.lower()}.",
                )

    async def _decompress(self, source: BinaryIO, request: ImportRequest, target: Path) -> None:
        """Write the decompressed source as a sparse file."""
        compression = request.chosen_compression()
        code = "image-too-large" if compression == "none" else "decompression-bomb"
        overlong = NotVerified(
            code,
            f"The file holds more than {self._image_bytes_max} bytes; raise fetch.max_image_bytes "
            "if that is intended.",
        )
        chunks = chunks_of(
            decompressed(source, compression), self._image_bytes_max, overlong=overlong
        )
        with target.open("wb") as file:
            position = 0

            def write(batch: Batch) -> None:
                nonlocal position
                self._space.require(sum(map(len, batch)))
                with full_disk_is_no_space(target.parent):
                    for chunk in batch:
                        write_sparse(file.fileno(), chunk, position)
                        position += len(chunk)
                    file.truncate(position)

            await ingest(chunks, [write], (), limiter=self._limiter, progress=_no_progress)

    async def _convert(self, container: Path, image: Path) -> None:
        size_bytes = await conversion.inspect(container, image_bytes_max=self._image_bytes_max)
        await conversion.convert(container, image, size_bytes=size_bytes, space=self._space)


def _disk_bytes(request: ImportRequest, content_bytes: int) -> int:
    """Return the size of the disk; raises `InvalidInput` (`size-too-small`)."""
    if request.size_bytes is not None and request.size_bytes < content_bytes:
        raise InvalidInput(
            "size-too-small",
            f"The content has {content_bytes} bytes; make the disk at least that large.",
            field="size_bytes",
        )
    whole = -(-content_bytes // _SECTOR_BYTES) * _SECTOR_BYTES
    return request.size_bytes or max(whole, _DISK_BYTES_MIN)


def _open(path: Path) -> BinaryIO:
    return path.open("rb", buffering=0)


def _no_progress(_: int) -> None:
    """Count nothing: the download has been counted already."""
