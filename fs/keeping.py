"""What keeps the cache in `blockd`: repair, scrubber, eviction and verification, put together."""

from collections.abc import Callable, Collection
from functools import partial

import trio

from stratocache.cache.configuration import Configuration
from stratocache.cache.demand import ChunkFetcher
from stratocache.cache.fetch import Fetcher
from stratocache.cache.images import ImageStore
from stratocache.cache.repair import Repairer
from stratocache.cache.restoration import EntryOrigins
from stratocache.cache.supply import Supply
from stratocache.fs.acquisition import Acquisition
from stratocache.fs.disks import DiskStore
from stratocache.fs.eviction import EVICT, Eviction
from stratocache.fs.image_lookup import entry_finder
from stratocache.fs.losses import RepairRecord
from stratocache.fs.operations import Performer
from stratocache.fs.provisional import ProvisionalImages
from stratocache.fs.scrubbing import Scrubbing
from stratocache.fs.state import Database
from stratocache.fs.verification import VERIFY, Verification


class Keeping:
    """The keepers of one cache; make it in the loop that they run in."""

    def __init__(
        self,
        configuration: Configuration,
        db: Database,
        images: ImageStore,
        disks: DiskStore,
        fetcher: Fetcher,
        chunk_fetcher: ChunkFetcher,
        supply: Supply,
        acquisition: Acquisition,
        provisional: ProvisionalImages,
        nursery: trio.Nursery,
        wake: Callable[[], None],
    ) -> None:
        record = RepairRecord(db, disks.forget_images)
        origins = EntryOrigins(images, fetcher, chunk_fetcher, entry_finder(db), nursery)
        repairer = Repairer(images, origins, record, nursery)
        self._supply, self._repairer = supply, repairer
        self.scrubbing = Scrubbing(configuration, db, images, repairer, record)
        self.eviction = Eviction(
            configuration,
            db,
            images.chunks,
            partial(_reduce, images, disks),
            acquisition.held,
            wake,
        )
        fetcher.set_room(self.eviction)
        self.performers: dict[str, Performer] = {
            EVICT: self.eviction,
            VERIFY: Verification(db, images, repairer, provisional),
        }
        self._nursery = nursery

    def start(self) -> None:
        """Begin to repair, to scrub and to evict; what a crash left must have been swept."""
        self._supply.begin_repairs(self._repairer)
        self._nursery.start_soon(self.scrubbing.run)
        self._nursery.start_soon(self.eviction.watch)


def _reduce(images: ImageStore, disks: DiskStore, image_id: str, keep: Collection[bytes]) -> int:
    disks.forget_image(images.reader(image_id))
    return images.reduce(image_id, keep)
