"""What media and people do to the files of a cache: each kind hurts one or two files."""

import os
from collections.abc import Callable
from pathlib import Path
from random import Random

Damage = Callable[[list[Path], Random], None]


def flip(files: list[Path], chance: Random) -> None:
    """Turn one bit, in place."""
    path = chance.choice(files)
    size = path.stat().st_size
    if not size:
        return
    offset = chance.randrange(size)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << chance.randrange(8)]))


def cut(files: list[Path], chance: Random) -> None:
    """Shorten a file."""
    path = chance.choice(files)
    os.truncate(path, chance.randrange(max(1, path.stat().st_size)))


def lengthen(files: list[Path], chance: Random) -> None:
    """Add bytes to a file."""
    with chance.choice(files).open("ab") as file:
        file.write(chance.randbytes(chance.randrange(1, 5000)))


def blank(files: list[Path], chance: Random) -> None:
    """Make a page of a file zeros."""
    path = chance.choice(files)
    with path.open("r+b") as file:
        file.seek(chance.randrange(max(1, path.stat().st_size)) & ~4095)
        file.write(bytes(4096))


def swap(files: list[Path], chance: Random) -> None:
    """Exchange two files."""
    if len(files) < 2:
        return
    one, other = chance.sample(files, 2)
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def remove(files: list[Path], chance: Random) -> None:
    """Delete a file."""
    chance.choice(files).unlink()


KINDS: dict[str, Damage] = {
    "flip": flip, "cut": cut, "lengthen": lengthen, "blank": blank, "swap": swap, "remove": remove,
}  # fmt: skip
ROOMS = ("chunks", "manifests", "seals")
DAMAGES = [f"{room}-{kind}" for room in ROOMS for kind in KINDS]
"""What happens to the files that hold an image."""
INDEX_DAMAGES = [f"index-{kind}" for kind in ("flip", "cut", "blank", "remove")]
"""What happens to the account of the chunk files, a database that is open meanwhile."""


def damage(state_dir: Path, kind: str, chance: Random) -> bool:
    """Hurt a file of a kind, when there is one; tell whether."""
    room, _, name = kind.partition("-")
    files = _files(state_dir, room)
    if not files:
        return False
    try:
        KINDS[name](files, chance)
    except FileNotFoundError:
        return False  # it went to quarantine meanwhile
    return True


def _files(state_dir: Path, room: str) -> list[Path]:
    """Return the files that are in their places; what is still being written is not hurt."""
    match room:
        case "index":
            found = [state_dir / "chunks" / "cache.db"]
        case "chunks":
            found = [path for path in (state_dir / room).rglob("*") if len(path.name) == 64]
        case _:
            found = list((state_dir / room).glob("[!.]*"))
    return sorted(path for path in found if path.is_file())
