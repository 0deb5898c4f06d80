"""What takes the space of the state directory's file system, as a bar shows it: parts side by side."""

from collections.abc import Mapping

Part = tuple[str, int, str]
"""What it is called, its bytes, and its kind, which gives its colour."""


def space_parts(space: Mapping[str, int]) -> list[Part]:
    """Return the parts of `OverviewSpace`, without overlaps, as far as that is known."""
    ours = [
        ("Images and snapshots", space["chunk_bytes"] + space["manifest_bytes"], "images"),
        ("Disks", space["disk_allocated_bytes"], "disks"),
        ("On its way", space["stage_bytes"], "stage"),
        ("Quarantine", space["quarantine_bytes"], "quarantine"),
    ]
    kept = [part for part in ours if part[1] or part[2] in ("images", "disks")]
    used_bytes = space["total_bytes"] - space["free_bytes"]
    other_bytes = max(0, used_bytes - sum(size_bytes for _name, size_bytes, _kind in ours))
    reserve_bytes = min(space["reserve_bytes"], space["free_bytes"])
    return [
        *kept,
        ("Others on this file system", other_bytes, "other"),
        ("Reserve for disks", reserve_bytes, "reserve"),
        ("Free", space["free_bytes"] - reserve_bytes, "free"),
    ]
