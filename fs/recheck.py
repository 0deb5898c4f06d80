"""Asking catalogues again about the images that are here: when, how often, and whom not now.

Every image is asked about once per interval, and soon after somebody fetched it anew. One question
is asked at a time, with a pause after it; hosts that began together do not ask together. A catalogue
that cannot be reached says nothing about its images and is left alone, longer each time.
"""

import logging
import sqlite3
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from random import Random

import trio

from stratocache.cache.catalogue import Catalogues, Standing
from stratocache.cache.configuration import Configuration
from stratocache.cache.errors import NotFound, OriginFailed
from stratocache.fs import inventory, withdrawal
from stratocache.fs.records import Image
from stratocache.fs.state import Database

log = logging.getLogger(__name__)

_LOOK_S = 30.0
_JITTER = 0.1
"""Of each interval, more or less."""
_START_SPREAD_S = 600.0
"""Over which questions are spread that came due while nobody asked."""
_REST_S = 60.0
"""For which a catalogue is left alone when it fails for the first time."""
_ROWS = """
    SELECT id, state, coalesce(checked_at, verified_at) AS last_at, unlisted_since FROM images
    WHERE state IN ('verified', 'withdrawn')
    OR (state = 'provisional' AND skeleton_since IS NOT NULL) ORDER BY last_at
"""


class Recheck:
    """Asks about the images of one host; belongs to one trio loop."""

    def __init__(self, configuration: Configuration, db: Database, catalogues: Catalogues) -> None:
        self._known = configuration.catalogues
        self._settings = configuration.recheck
        self._db = db
        self._catalogues = catalogues
        self._random = Random()
        self._started = datetime.now(UTC)
        self._luck: dict[str, float] = {}
        """By image, where in its jitter the next question is."""
        self._rests: dict[str, tuple[float, float]] = {}
        """By catalogue that failed, until when (trio's clock) it rests, and for how long."""
        self._noted: set[str] = set()
        self._woken = trio.Event()

    def note(self, image_id: str) -> None:
        """Ask about an image soon: somebody fetches what is here."""
        self._noted.add(image_id)
        self._woken.set()

    def resting(self) -> dict[str, float]:
        """Return the catalogues that failed lately, and for how many seconds each is left alone."""
        return {name: rest_s for name, (_, rest_s) in self._rests.items()}

    async def run(self) -> None:
        """Ask for ever."""
        settings = self._settings
        look_s = min(_LOOK_S, settings.interval_s / 4, max(settings.confirm_s, 1) / 4)
        while True:
            self._woken = trio.Event()
            try:
                await self._ask_all()
            except Exception:
                log.exception("asking catalogues again failed; it is tried again")
            with trio.move_on_after(look_s):
                await self._woken.wait()

    async def _ask_all(self) -> None:
        """Ask about every image whose time has come."""
        for image_id in await trio.to_thread.run_sync(self._due, frozenset(self._noted)):
            image = await trio.to_thread.run_sync(inventory.find_image, self._db, image_id)
            if image is not None and image.settled and self._may_ask(image):
                try:
                    await self._ask(image)
                except Exception:  # the others are asked about all the same
                    log.exception("asking about image %s failed", image_id)
                await trio.sleep(self._settings.pause_s)

    def _may_ask(self, image: Image) -> bool:
        catalogue = image.entry.catalogue
        if catalogue not in self._known:
            self._noted.discard(image.id)
            return False
        return catalogue not in self._rests or self._rests[catalogue][0] <= trio.current_time()

    async def _ask(self, image: Image) -> None:
        self._noted.discard(image.id)
        self._luck.pop(image.id, None)
        try:
            standing = await self._catalogues.standing(image.entry, now=datetime.now(UTC))
        except NotFound as error:
            log.warning("image %s cannot be asked about: %s", image.id, error.message)
        except OriginFailed as error:
            self._let_rest(image.entry.catalogue, error)
        else:
            self._rests.pop(image.entry.catalogue, None)
            await trio.to_thread.run_sync(self._record, image, standing)

    def _record(self, image: Image, standing: Standing) -> None:
        if standing.verdict in ("unlisted", "unknown"):
            log.info("of image %s: %s: %s", image.id, standing.verdict, standing.reason)
        withdrawal.record(self._db, image, standing, confirm_s=self._settings.confirm_s)

    def _let_rest(self, catalogue: str, error: OriginFailed) -> None:
        _, before_s = self._rests.get(catalogue, (0.0, 0.0))
        rest_s = min(max(2 * before_s, _REST_S), self._settings.interval_s)
        self._rests[catalogue] = (trio.current_time() + rest_s, rest_s)
        log.warning("catalogue %s is asked again in %.0f s: %s", catalogue, rest_s, error.message)

    def _due(self, noted: Collection[str]) -> list[str]:
        """Return the ids of images to ask about now, the one asked about longest ago first."""
        at = datetime.now(UTC)
        rows = self._db.rows(_ROWS)
        self._luck = {row["id"]: self._luck.get(row["id"], self._random.random()) for row in rows}
        return [row["id"] for row in rows if row["id"] in noted or self._due_at(row, at) <= at]

    def _due_at(self, row: sqlite3.Row, at: datetime) -> datetime:
        settings, luck = self._settings, self._luck[row["id"]]
        if row["state"] != "withdrawn" and row["unlisted_since"] is not None:
            wait_s = settings.confirm_s * (1 + _JITTER * luck)
            due = datetime.fromisoformat(row["unlisted_since"]) + timedelta(seconds=wait_s)
        else:
            wait_s = settings.interval_s * (1 - _JITTER + 2 * _JITTER * luck)
            last = datetime.fromisoformat(row["last_at"])
            # the clock may have been set back since
            due = min(last, at) + timedelta(seconds=wait_s)
        spread_s = min(_START_SPREAD_S, _JITTER * wait_s) * luck
        return max(due, self._started + timedelta(seconds=spread_s))
