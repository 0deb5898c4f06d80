"""The data image of the demonstration: one ext4 partition with a small, known file tree."""

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

from stratodemo.programs import run_program

IMAGE_BYTES = 64 * 1024**2
FILE_SYSTEM_LABEL = "stratocache-data"

_PARTITION_BYTES_OFFSET = 1024**2
_README = """\
Measurements of the little weather station, for the demonstration of Stratocache.

  station.csv    one line per hour: time, temperature, pressure
  raw/*.bin      the instrument's own records
"""


def file_tree() -> dict[str, bytes]:
    """Return the files of the image, the same on every machine: path → content."""
    hours = "".join(
        f"2026-11-{1 + hour // 24:02}T{hour % 24:02}:00:00Z,{8 + hour * 7 % 11},{990 + hour * 3 % 37}\n"
        for hour in range(240)
    )
    tree = {"README": _README.encode(), "station.csv": hours.encode()}
    for number in range(4):
        # SHAKE gives any number of bytes that no compressor makes smaller.
        tree[f"raw/record-{number}.bin"] = hashlib.shake_256(bytes([number])).digest(1024**2)
    return tree


def digests(tree: Mapping[str, bytes]) -> dict[str, str]:
    """Return each file's SHA-256 in hexadecimal."""
    return {path: hashlib.sha256(content).hexdigest() for path, content in tree.items()}


def build_data_image(directory: Path) -> Path:
    """Return the raw image in `directory`, made when it is not there.

    Raises `ProgramError` when a tool fails; no half-made image stays.
    """
    tree = file_tree()
    image = directory / f"data-{_recipe_digest(tree)}.raw"
    if image.exists():
        return image
    with tempfile.TemporaryDirectory(dir=directory, prefix="data-") as work_name:
        work = Path(work_name)
        for path, content in tree.items():
            target = work / "tree" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        unfinished = work / "image.raw"
        _write_disk(work / "tree", unfinished)
        for stale in directory.glob("data-*.raw*"):
            stale.unlink()
        unfinished.rename(image)
    return image


def _recipe_digest(tree: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path, content in tree.items():
        digest.update(path.encode() + content)
    return digest.hexdigest()[:12]


def _write_disk(tree: Path, image: Path) -> None:
    with image.open("wb") as disk:
        disk.truncate(IMAGE_BYTES)
    run_program(["sfdisk", "--quiet", str(image)], text="label: dos\nstart=1MiB, type=83\n")
    run_program([
        "mkfs.ext4", "-q", "-F", "-m", "0", "-L", FILE_SYSTEM_LABEL, "-d", str(tree),
        "-E", f"offset={_PARTITION_BYTES_OFFSET},root_owner=0:0",
        str(image), f"{(IMAGE_BYTES - _PARTITION_BYTES_OFFSET) // 1024}k",
    ])  # fmt: skip
