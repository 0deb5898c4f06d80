"""What was made of an image, as a tree."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.api_daemon import IMAGE_ID, ROOT, insert_image
from support.lineage import add_disk, add_snapshot

from stratocache.fs.lineage import DEPTH_MAX, DiskNode, Lineage, lineage_of
from stratocache.fs.records import Caller
from stratocache.fs.state import Database

SOMEBODY = Caller("somebody", "user")
Tree = dict[str, "Tree"]


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    """A database with one image."""
    db = Database(tmp_path / "state.db")
    db.migrate()
    insert_image(db)
    yield db
    db.close()


def tree(disks: tuple[DiskNode, ...]) -> Tree:
    """Return disks and snapshots as nested names."""
    return {
        node.disk.uuid: {item.snapshot.id: tree(item.disks) for item in node.snapshots}
        for node in disks
    }


def numbers(lineage: Lineage) -> tuple[int, int, int]:
    """Return the counts of a lineage."""
    return lineage.disk_count, lineage.snapshot_count, lineage.omitted_count


def test_clones_are_below_their_snapshots(db: Database) -> None:
    """Every disk is below what it was made of, however deep, and nothing is there twice."""
    first = add_disk(db)
    early, late = add_snapshot(db, first), add_snapshot(db, first)
    second = add_disk(db)
    clone = add_disk(db, of=late)
    other = add_disk(db, of=late)
    below = add_snapshot(db, clone)
    last = add_disk(db, of=below)

    lineage = lineage_of(db, ROOT, IMAGE_ID)

    assert tree(lineage.disks) == {
        first: {early: {}, late: {clone: {below: {last: {}}}, other: {}}},
        second: {},
    }
    assert numbers(lineage) == (5, 3, 0)


def test_a_clone_whose_snapshot_is_gone_is_a_disk_of_the_image(db: Database) -> None:
    """What has lost its parent is shown all the same."""
    first = add_disk(db)
    orphan = add_disk(db, of="00000000-0000-4000-8000-00000000dead")
    assert tree(lineage_of(db, ROOT, IMAGE_ID).disks) == {first: {}, orphan: {}}


def test_nobody_sees_what_is_not_theirs(db: Database) -> None:
    """A private disk of somebody else, and its snapshots, are not even counted; a public clone of
    one of them is there by itself."""
    secret = add_disk(db)
    snapshot = add_snapshot(db, secret)
    public = add_disk(db, of=snapshot, public=True)
    own = add_disk(db, owner=SOMEBODY.name)

    lineage = lineage_of(db, SOMEBODY, IMAGE_ID)

    assert tree(lineage.disks) == {public: {}, own: {}}
    assert numbers(lineage) == (2, 0, 0)


def test_very_many_disks_are_counted(db: Database) -> None:
    """Beyond a limit the oldest are named and the others counted."""
    with db.transaction():
        disks = [add_disk(db) for _ in range(12)]
        for _ in range(3):
            add_snapshot(db, disks[0])
    lineage = lineage_of(db, ROOT, IMAGE_ID, nodes_max=2)
    assert list(tree(lineage.disks)) == disks[:2]
    assert numbers(lineage) == (12, 3, 11)


def test_very_long_chains_are_cut(db: Database) -> None:
    """A chain of clones of snapshots of clones ends at a depth that every reader bears."""
    snapshot = None
    with db.transaction():
        for _ in range(DEPTH_MAX + 5):
            snapshot = add_snapshot(db, add_disk(db, of=snapshot))
    assert numbers(lineage_of(db, ROOT, IMAGE_ID)) == (DEPTH_MAX + 5, DEPTH_MAX + 5, 10)
