"""Getting an image into the cache once, however many operations wait for it.

A *flight* is the one fetch of one image. Every waiter that asks for an image whose flight is up
joins it; the flight is cancelled when its last waiter is, and then nothing of it is left. A flight
that process death interrupts is taken up by the operation that is run again: its stage directory
is kept as long as an operation that may want it is open (`tidy`).
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

import trio

from stratocache.cache.catalogue import Catalogues
from stratocache.cache.configuration import Configuration
from stratocache.cache.entry import LOCAL_CATALOGUE, Entry
from stratocache.cache.errors import (
    Cancelled,
    Conflict,
    Internal,
    NotFound,
    StratocacheError,
)
from stratocache.cache.fetch import Fetcher
from stratocache.cache.identifier import is_identifier
from stratocache.cache.images import ImageStore
from stratocache.cache.promises import FetchedImage
from stratocache.cache.provisional_policy import require_provisional
from stratocache.cache.reference import Reference, parse
from stratocache.fs import inventory
from stratocache.fs.image_lookup import rejected
from stratocache.fs.manifests import named_manifests, published_manifests
from stratocache.fs.provisional import ProvisionalImages
from stratocache.fs.recheck import Recheck
from stratocache.fs.records import READABLE, SERVABLE, Image
from stratocache.fs.skeletons import SLEEP_AGAIN
from stratocache.fs.state import Database, now, record_event
from stratocache.fs.withdrawal import reinstate, withdrawn

log = logging.getLogger(__name__)

_GOING_TIMEOUT_S = 60.0
_GOING_POLL_S = 0.05

Report = Callable[[int, int | None], None]
"""Called with bytes done and bytes in all (None = not known)."""
_GIVE_UP = """
    UPDATE images SET state = 'deleting' WHERE state = 'provisional' AND pinned = 0
    AND skeleton_since IS NULL
    AND NOT EXISTS (SELECT 1 FROM disks WHERE base_image = images.id)
    AND NOT EXISTS (SELECT 1 FROM attachments WHERE image_id = images.id)
"""


@dataclass
class _Flight:
    entry: Entry
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    landed: trio.Event = field(default_factory=trio.Event)
    waiters: int = 0
    followed: bool = False
    """Whether an operation waits, or waited, for the complete image."""
    done_bytes: int = 0
    total_bytes: int | None = None
    reports: list[Report] = field(default_factory=list)
    error: StratocacheError | None = None


class Acquisition:
    """Resolves references and keeps one flight per image; flights run in `nursery`."""

    def __init__(
        self,
        configuration: Configuration,
        db: Database,
        catalogues: Catalogues,
        fetcher: Fetcher,
        images: ImageStore,
        provisional: ProvisionalImages,
        recheck: Recheck,
        nursery: trio.Nursery,
    ) -> None:
        self._configuration = configuration
        self._db = db
        self._catalogues = catalogues
        self._fetcher = fetcher
        self._images = images
        self._provisional = provisional
        self._recheck = recheck
        self._nursery = nursery
        self._flights: dict[str, _Flight] = {}
        self._slots = trio.CapacityLimiter(configuration.fetch.max_parallel)
        self._holds: list[set[str]] = []

    @contextmanager
    def holding(self) -> Iterator[set[str]]:
        """Yield a set; images whose ids are in it are not evicted during the block."""
        hold: set[str] = set()
        self._holds.append(hold)
        try:
            yield hold
        finally:
            self._holds = [other for other in self._holds if other is not hold]

    def held(self) -> set[str]:
        """Return the ids of the images that operations under way are about to use."""
        return set().union(*self._holds)

    async def acquire(
        self,
        text: str,
        report: Report,
        hold: set[str],
        *,
        complete: bool = False,
        provisional: bool = False,
    ) -> Image:
        """Return the image that a reference means, fetching it when it is not here.

        It is verified; unless `complete` it may also be provisional, and then its chunks are
        verified one by one, or not even that if the caller takes `provisional` ones and the policy
        for the endorser allows it. From before it is looked for until `hold` ends nobody here
        evicts it.

        A cached image is judged again by its stored entry, without its catalogue; one that was
        made on this host (`local:ID`, or its id alone) needs no judgement. With `complete` the
        catalogue of one that was withdrawn is asked whether it lists it again. Raises what
        resolving, judging or fetching raises, `NotVerified` (`image-rejected`) and `Refused`
        (`image-withdrawn`, `provisional-refused`).
        """
        hold.add(self._reference(text).path)
        known = self._find(text)
        entry = await self._entry(text, known, renew=complete)
        hold.add(entry.identifier)
        seen = known is not None and known.state != "withdrawn"
        while True:
            image = inventory.find_image(self._db, entry.identifier)
            if provisional and (image is None or image.state == "fetching" or image.unproven):
                require_provisional(self._configuration, entry)
            waiting = complete or (image is not None and image.unproven and not provisional)
            if image is not None and image.state == "provisional" and waiting:
                seen = True  # whoever deletes it from now on means it
                await self._provisional.wait(image.id, report)
            elif image is not None and image.state in SERVABLE:
                return image
            elif image is not None and image.state == "withdrawn" and not seen:
                if not await trio.to_thread.run_sync(reinstate, self._db, image, entry):
                    raise withdrawn(image)
            elif image is not None and image.state == "deleting" and not seen:
                await self._wait_until_gone(image.id)
            elif image is not None and image.state != "fetching":
                raise _unusable(image)
            elif seen:
                raise Conflict("image-busy", f"Image {entry.identifier} was deleted; try again.")
            else:
                await self._wait_for_flight(entry, report, complete=complete)

    async def _entry(self, text: str, known: Image | None, *, renew: bool) -> Entry:
        """Return the stored entry, judged again, else what the catalogue says; that is asked soon
        again, to `renew` what is here, and now about an image that is withdrawn."""
        if known is not None and renew:
            self._recheck.note(known.id)
        if known is not None and not (renew and known.state == "withdrawn"):
            self.judge(known)
            return known.entry
        try:
            return await self._catalogues.resolve(text, now=datetime.now(UTC))
        except StratocacheError as error:
            if known is None:
                raise
            log.info("image %s stays withdrawn: %s", known.id, error.message)
            raise withdrawn(known) from error

    async def _wait_until_gone(self, image_id: str) -> None:
        """Wait while an image is being deleted or evicted; raises `Conflict` (`image-busy`)."""
        with trio.move_on_after(_GOING_TIMEOUT_S):
            while True:
                image = inventory.find_image(self._db, image_id)
                if image is None or image.state != "deleting":
                    return
                await trio.sleep(_GOING_POLL_S)
        raise Conflict("image-busy", f"Image {image_id} is being deleted; try again.")

    def cached(self, text: str) -> Image | None:
        """Return the image that a reference means, judged again; None if it cannot be used yet.

        Only names by id are known here. Raises what judging raises, and `Refused`
        (`image-withdrawn`). Blocks on the state database; any thread may call it.
        """
        image = self._find(text)
        if image is None:
            return None
        self.judge(image)
        # whoever wants what nothing proves yet has to say so
        return None if image.unproven else image

    def known(self, text: str) -> Image | None:
        """Return the image that a reference means, if it is here and named by its id; raises
        `InvalidInput` and `NotFound`."""
        return self._find(text)

    def judge(self, image: Image) -> None:
        """Judge a cached image by its stored entry; raises `Refused`, `NotFound`."""
        if image.state == "withdrawn":
            raise withdrawn(image)
        if image.entry.catalogue != LOCAL_CATALOGUE:
            self._catalogues.recheck(image.entry, now=datetime.now(UTC))

    def _reference(self, text: str) -> Reference:
        catalogues = self._configuration.catalogues
        endpoints = {name: item.endpoint for name, item in catalogues.items()}
        default = self._configuration.default_catalogue
        return parse(text, default, {LOCAL_CATALOGUE: "", **endpoints})

    def _find(self, text: str) -> Image | None:
        reference = self._reference(text)
        if not is_identifier(reference.path):
            return None
        image = inventory.find_image(self._db, reference.path)
        default = self._configuration.default_catalogue
        if image is not None and image.state in READABLE and _same(reference, image, default):
            return image
        if reference.catalogue == LOCAL_CATALOGUE:
            raise NotFound(
                "image-unknown", f"No image {reference.path} was saved here.", field="reference"
            )
        return None

    async def _wait_for_flight(self, entry: Entry, report: Report, *, complete: bool) -> None:
        flight = self._flights.get(entry.identifier)
        if flight is not None and flight.scope.cancel_called:
            await flight.landed.wait()
            return  # it was going down; the caller looks again and starts its own
        if flight is None:
            flight = _Flight(entry)
            self._flights[entry.identifier] = flight
            self._nursery.start_soon(self._fly, flight)
        flight.waiters += 1
        flight.followed |= complete
        flight.reports.append(report)
        report(flight.done_bytes, flight.total_bytes)
        try:
            await flight.landed.wait()
        finally:
            flight.waiters -= 1
            flight.reports.remove(report)
            if flight.waiters == 0 and not flight.landed.is_set():
                flight.scope.cancel()
                with trio.CancelScope(shield=True):
                    await flight.landed.wait()
        if flight.error is not None:
            raise flight.error

    async def _fly(self, flight: _Flight) -> None:
        identifier = flight.entry.identifier
        try:
            with flight.scope:
                async with self._slots:
                    await trio.to_thread.run_sync(self._begin, flight.entry)
                    if not await self._provisional.land(flight.entry, flight):
                        fetched = await self._fetcher.fetch(flight.entry, _progress(flight))
                        await trio.to_thread.run_sync(self._land, fetched)
            if flight.scope.cancelled_caught:
                flight.error = Cancelled("cancelled", "The fetch was cancelled; nothing is kept.")
        except StratocacheError as error:
            flight.error = error
        except Exception as error:
            log.exception("fetch of %s failed", identifier)
            flight.error = Internal("internal", f"Fetching {identifier} failed: {error!r}.")
        finally:
            del self._flights[identifier]
            try:
                if flight.error is not None:
                    with trio.CancelScope(shield=True):
                        await trio.to_thread.run_sync(self._abandon, identifier)
            finally:
                flight.landed.set()  # whatever happens: who waits for it may be shielded

    def _begin(self, entry: Entry) -> None:
        with self._db.transaction() as connection:
            connection.execute(
                "INSERT INTO images (id, state, entry, created_at) VALUES (?, 'fetching', ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET entry = excluded.entry",
                (entry.identifier, entry.model_dump_json(), now()),
            )

    def _land(self, fetched: FetchedImage) -> None:
        with self._db.transaction() as connection:
            connection.execute(
                "UPDATE images SET state = 'verified', size_bytes = ?, sha256 = ?, verified_at = ? "
                "WHERE id = ?",
                (fetched.size_bytes, fetched.sha256, now(), fetched.identifier),
            )
            record_event(
                connection, "image.verified", fetched.identifier,
                f"Image {fetched.identifier} is complete, its digests are proven.",
            )  # fmt: skip

    def _abandon(self, identifier: str) -> None:
        self._fetcher.discard(identifier)
        image = inventory.find_image(self._db, identifier)
        if image is not None and image.state != "fetching":
            return  # it had landed before it was cancelled
        with suppress(NotFound):
            self._images.remove(identifier)
        with self._db.transaction() as connection:
            connection.execute(
                "DELETE FROM images WHERE id = ? AND state = 'fetching'", (identifier,)
            )

    def note_launch(self, reference: str) -> None:
        """Learn what the first boot of an image reads from now on, and let it read undisturbed.

        A launch whose reference is none was refused: it teaches nothing.
        """
        try:
            image = self._find(reference)
        except StratocacheError:
            return
        if image is not None:
            self._provisional.note_launch(image)

    def statistics(self) -> dict[str, int]:
        """Return how many wait for each image that is in flight."""
        return {image_id: flight.waiters for image_id, flight in self._flights.items()}

    def tidy(self) -> None:
        """Drop images that are neither complete nor in flight, unless an operation may want them.

        One that is provisional stays as long as anything uses it.

        Called at start and whenever an operation has ended. Blocks on file I/O.
        """
        wanted = self._db.row(
            "SELECT 1 FROM operations WHERE state IN ('pending', 'running') "
            "AND kind IN ('fetch', 'launch', 'create-disk')"
        )
        if wanted is not None:
            return
        for image in inventory.images(self._db):
            if image.state == "fetching" and image.id not in self._flights:
                self._abandon(image.id)
        with self._db.transaction() as connection:
            connection.execute(_GIVE_UP)
            connection.execute(SLEEP_AGAIN, (now(),))

    def sweep(self) -> None:
        """At start, delete whatever files no row of the state database accounts for."""
        self.tidy()
        self._provisional.sweep()
        named = named_manifests(self._db)
        for identifier in set(self._images.identifiers()) - named:
            self._images.remove(identifier)
        coming = {
            image.id
            for image in inventory.images(self._db)
            if image.state in ("fetching", "provisional")
        }
        self._fetcher.sweep(coming, published_manifests(self._db))


def _unusable(image: Image) -> StratocacheError:
    if image.state == "rejected":
        return rejected(image)
    if image.state == "withdrawn":
        return withdrawn(image)
    return Conflict("image-busy", f"Image {image.id} is {image.state}; try again.")


def _same(reference: Reference, image: Image, default_catalogue: str) -> bool:
    entry = image.entry
    # an id alone means the default catalogue's image, or the same content made on this host
    local = entry.catalogue == LOCAL_CATALOGUE and reference.catalogue == default_catalogue
    if reference.catalogue != entry.catalogue and not local:
        return False
    if reference.pin is None:
        return True
    algorithm, digest = reference.pin
    return entry.digests.get(algorithm) == digest


def _progress(flight: _Flight) -> Report:
    def note(done_bytes: int, total_bytes: int | None) -> None:
        flight.done_bytes, flight.total_bytes = done_bytes, total_bytes
        for report in flight.reports:
            report(done_bytes, total_bytes)

    return note
