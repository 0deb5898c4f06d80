"""The images of the demonstration: sound, complete, made once, and nothing half made."""

import gzip
import hashlib
import json
from pathlib import Path

import pytest
from stratodemo.data_image import build_data_image
from stratodemo.kernel_modules import dependencies
from stratodemo.programs import ProgramError, run_program
from stratodemo.system_image import build_system_image, compress
from support import guests

pytestmark = pytest.mark.vm

_MIB = 1024**2


def _image(kind: str) -> Path:
    return guests.system_image() if kind == "system" else guests.data_image()


@pytest.mark.parametrize(("kind", "least_bytes"), [("system", 256 * _MIB), ("data", 64 * _MIB)])
def test_image_is_one_sound_linux_partition(kind: str, least_bytes: int) -> None:
    """An image is a partition table with one Linux partition whose ext4 e2fsck finds clean."""
    image = _image(kind)
    assert image.stat().st_size >= least_bytes
    table = json.loads(run_program(["sfdisk", "--json", image]))["partitiontable"]
    assert [(part["start"], part["type"]) for part in table["partitions"]] == [(2048, "83")]
    run_program(["e2fsck", "-fn", f"{image}?offset={2048 * 512}"])


@pytest.mark.parametrize("kind", ["system", "data"])
def test_image_is_built_once(kind: str) -> None:
    """A second build gives the same, untouched file."""
    image = _image(kind)
    made_at = image.stat().st_mtime_ns
    assert _image(kind) == image
    assert image.stat().st_mtime_ns == made_at


@pytest.mark.slow
def test_compressed_image_holds_the_same_bytes() -> None:
    """The published form is gzip of exactly the raw image."""
    image = guests.system_image()
    with image.open("rb") as raw, gzip.open(compress(image)) as packed:
        assert hashlib.file_digest(packed, "sha256").digest() == (
            hashlib.file_digest(raw, "sha256").digest()
        )


def test_failed_build_leaves_no_image(tmp_path: Path) -> None:
    """A broken package ends the build with dpkg's complaint and nothing but the package stays."""
    store = tmp_path / "packages"
    store.mkdir()
    for name in ("linux-image-6", "busybox-static", "e2fsprogs", "libext2fs2", "libcom-err2",
                 "libblkid1", "libuuid1", "libc6"):  # fmt: skip
        (store / f"{name}_1_amd64.deb").write_bytes(b"no archive")
    with pytest.raises(ProgramError, match="dpkg-deb"):
        build_system_image(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["packages"]


def test_data_image_is_the_same_file_tree_in_any_folder(tmp_path: Path) -> None:
    """A build elsewhere holds the same README as the first one, read by debugfs."""
    names = []
    for image in (guests.data_image(), build_data_image(tmp_path)):
        names.append(run_program(["debugfs", "-R", "cat /README", f"{image}?offset={_MIB}"]))
    assert names[0] == names[1]
    assert "station.csv" in names[0]


def test_modules_are_loaded_after_what_they_need(tmp_path: Path) -> None:
    """Each module's list names all it needs, whoever is needed by another one later in the list."""
    needs = {"disk": "bus,ring", "bus": "ring", "ring": "base", "base": "", "odd-name": "disk,core"}
    for name, depends in needs.items():
        (tmp_path / f"{name}.ko").write_bytes(b"\x7fELF\0depends=" + depends.encode() + b"\0")
    order = dependencies(tmp_path)
    assert order["disk.ko"] == ["bus.ko", "ring.ko", "base.ko"]
    assert order["odd-name.ko"] == ["disk.ko", "bus.ko", "ring.ko", "base.ko"]
