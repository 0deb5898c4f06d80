"""The plan of eviction: for each image when it was last used, what keeps it, and what its going
would free and cost. The order of the plan is the order of eviction: withdrawn images first."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from stratocache.cache.configuration import Configuration
from stratocache.cache.entry import LOCAL_CATALOGUE
from stratocache.cache.errors import NotVerified
from stratocache.cache.footprint import Footprint, footprints
from stratocache.fs.manifests import named_manifests
from stratocache.fs.partition import mounted_images
from stratocache.fs.records import Image
from stratocache.fs.skeletons import boot_chunks
from stratocache.fs.space_plan import ImageHolding, holdings
from stratocache.fs.state import Database

_NAMED_MAX = 3
_STATES = {
    "provisional": "still being fetched",
    "rejected": "rejected: delete it",
}
"""Phrases for images that are not evicted: what they lack they would lack again."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One image, and what its eviction would mean."""

    holding: ImageHolding
    kept_because: str | None
    """One phrase; None = it may go."""
    footprint: Footprint
    order: int | None
    """Its turn, from 1; None = it stays."""
    boot_bytes: int = 0
    """What stays of it at its turn, its boot set, to go after all others; 0 = it goes whole."""

    @property
    def freed_bytes(self) -> int:
        """What its turn frees."""
        return self.footprint.freed_bytes - self.boot_bytes

    @property
    def image(self) -> Image:
        """The image."""
        return self.holding.image

    @property
    def last_used_at(self) -> str:
        """When it was last cloned, attached, asked for or fetched."""
        return last_used_at(self.image)

    @property
    def refetch_bytes(self) -> int:
        """What fetching it again moves, at most: sources may be compressed."""
        return self.image.entry.size_bytes

    @property
    def origin(self) -> str | None:
        """Where it would come from: a host, `file`, or None when nobody has it."""
        if self.image.entry.catalogue == LOCAL_CATALOGUE or not self.image.entry.locations:
            return None
        parts = urlsplit(self.image.entry.locations[0])
        return parts.hostname or parts.scheme


def last_used_at(image: Image) -> str:
    """Return when an image was last of use, as the database stores times."""
    return max(filter(None, (image.last_used_at, image.verified_at, image.created_at)))


def eviction_plan(
    configuration: Configuration, db: Database, *, held: Collection[str] = ()
) -> list[Candidate]:
    """Return every image: first those that may go, in their order, then those that stay.

    `held` are images that operations under way hold. Reads every manifest.
    """
    found = holdings(db)
    mounted = mounted_images(configuration.blocks)
    reasons = {
        item.image.id: "mounted on this host" if item.image.id in mounted else why_kept(item, held)
        for item in found
    }
    going = sorted((item.image for item in found if reasons[item.image.id] is None), key=_turn)
    order = [image.id for image in going]
    staying = sorted(named_manifests(db) - set(order))
    counted: dict[str, Footprint] = {}
    try:
        partly = {image.id for image in going if image.asleep}
        counted = footprints(configuration.state_dir, staying, order, partly)
    except NotVerified as error:
        # no chunk is removed while it is unknown which ones a damaged manifest needs
        reasons = {name: reason or error.message for name, reason in reasons.items()}
    shown = [_candidate(item, reasons[item.image.id], counted.get(item.image.id)) for item in found]
    turns = {name: turn for turn, name in enumerate(order)}
    shown.sort(key=lambda item: (item.kept_because is not None, turns.get(item.image.id, 0)))
    return [
        replace(item, order=turn, boot_bytes=_boot_bytes(configuration, item))
        if item.kept_because is None
        else item
        for turn, item in enumerate(shown, 1)
    ]


def _turn(image: Image) -> tuple[bool, bool, str]:
    """Sort withdrawn images first: nobody may use them again. Boot sets go last."""
    return image.state != "withdrawn", image.asleep, last_used_at(image)


def _boot_bytes(configuration: Configuration, candidate: Candidate) -> int:
    """Return what stays of an image at its turn, 0 when that is all that it has."""
    boot_bytes = sum(boot_chunks(configuration, candidate.image).values())
    return boot_bytes if boot_bytes < candidate.footprint.freed_bytes else 0


def _candidate(holding: ImageHolding, reason: str | None, footprint: Footprint | None) -> Candidate:
    if reason is None and footprint is not None and footprint.freeable_bytes == 0:
        reason = "nothing to gain: all of it is shared with what stays"
    return Candidate(holding, reason, footprint or Footprint(), None)


def why_kept(holding: ImageHolding, held: Collection[str] = ()) -> str | None:
    """Return what keeps an image, as a phrase that names it; None when it may go."""
    image = holding.image
    if not image.settled:
        return _STATES.get(image.state, image.state)
    if image.pinned:
        return "pinned"
    if image.entry.catalogue == LOCAL_CATALOGUE or not image.entry.locations:
        return "made on this host: it could not be fetched again"
    if holding.disks:
        return f"base of {_names('disk', [disk.uuid for disk in holding.disks])}"
    if holding.snapshots:
        return f"base of {_names('snapshot', holding.snapshots)}"
    if holding.attachments:
        instances = sorted({item.instance for item in holding.attachments})
        return f"attached to {_names('instance', instances)}"
    if image.id in held:
        return "in use by an operation under way"
    return None


def _names(what: str, names: Collection[str]) -> str:
    shown = list(names)
    more = f" and {len(shown) - _NAMED_MAX} more" if len(shown) > _NAMED_MAX else ""
    return f"{what}{'s' if len(shown) > 1 else ''} {', '.join(shown[:_NAMED_MAX])}{more}"


def choose(plan: list[Candidate], wanted_bytes: int) -> list[Candidate]:
    """Return the first candidates that free so many bytes together, or all that may go."""
    chosen: list[Candidate] = []
    freed_bytes = 0
    for candidate in plan:
        if candidate.order is None or freed_bytes >= wanted_bytes:
            break
        chosen.append(candidate)
        freed_bytes += candidate.freed_bytes
    return chosen
