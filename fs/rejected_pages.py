"""What the kernel still has of images that were rejected: its pages go, and open files fail.

Whoever opened an image while it was provisional reads pages that the kernel keeps without asking
here. They survive this process too, so a new one lets go of them once more.
"""

import logging

import pyfuse3
import trio

from stratocache.fs.attributes import image_inode
from stratocache.fs.blocks import Blocks
from stratocache.fs.state import Database

log = logging.getLogger(__name__)


class RejectedPages:
    """Lets go of each rejected image once, in `nursery`. Belongs to one trio loop."""

    def __init__(self, db: Database, blocks: Blocks, nursery: trio.Nursery) -> None:
        self._db = db
        self._blocks = blocks
        self._nursery = nursery
        self._gone: set[int] = set()
        # one of its own: the kernel waits for pages that are being read
        self._limiter = trio.CapacityLimiter(1)

    def look(self) -> None:
        """Begin to let go of images that were rejected since the last look."""
        for row in self._db.rows("SELECT number FROM images WHERE state = 'rejected'"):
            if row["number"] not in self._gone:
                self._gone.add(row["number"])
                self._nursery.start_soon(self._let_go, row["number"])

    async def _let_go(self, number: int) -> None:
        self._blocks.forget_image(number)
        try:
            await trio.to_thread.run_sync(
                pyfuse3.invalidate_inode, image_inode(number), limiter=self._limiter,
                abandon_on_cancel=True,  # at the end of the process nobody waits for pages
            )  # fmt: skip
        except FileNotFoundError:
            return  # the kernel knows nothing of it
        except OSError:
            log.exception("pages of rejected image %d stay with the kernel", number)
