"""A bootable Debian of 2 GiB: debootstrap's tree, the rest full of bytes that do not compress.

The tree is what an ordinary small virtual machine has: systemd, udev, networking, the cloud kernel
with the initial RAM disk that initramfs-tools makes by itself. Nothing in it knows of Stratocache.
"""

import hashlib
import os
import random
import tempfile
from pathlib import Path

from stratodemo import bootable_disk
from stratodemo.bootable_disk import write_bootable_disk
from stratodemo.programs import run_program

FIRST_LINE = "Debian GNU/Linux"
"""Of the root file system's process 1: `Welcome to Debian GNU/Linux 12 (bookworm)!`."""
LAST_LINE = "Multi-User System"
"""Of the same, when it has started everything."""

_PACKAGES = (
    "systemd-sysv", "udev", "dbus", "ifupdown", "iproute2", "zstd", "linux-image-cloud-amd64",
)  # fmt: skip
_LABEL = "debian-root"
_KERNEL_COMMAND_LINE = (
    f"root=LABEL={_LABEL} ro console=ttyS0 quiet systemd.show_status=yes mitigations=off "
    # a busy host does not give the emulated timer its turn in time, and Linux panics over that
    "random.trust_cpu=on no_timer_check "
    # it would flush the terminal as it opens it, and systemd's last line with it now and then
    "systemd.mask=serial-getty@ttyS0.service"
)
_CONFIGURATION = f"""\
set root=(hd0,msdos1)
linux /vmlinuz {_KERNEL_COMMAND_LINE}
initrd /initrd.img
boot
"""
_LEFT_FREE_RATIO = 0.08
"""Of the disk: the file system's own tables and journal, and some room."""
_FILE_BYTES = 16 * 1024**2


def debian_image(directory: Path, size_bytes: int) -> Path:
    """Return the raw image in `directory`, made when there is none of this recipe; needs root.

    What it makes is the same as far as Debian's archive is: the random bytes are seeded. Raises
    `ProgramError`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    image = directory / f"debian-{_recipe_digest(size_bytes)}.raw"
    if image.exists():
        return image
    with tempfile.TemporaryDirectory(dir=directory, prefix="debian-") as name:
        work = Path(name)
        tree = work / "root"
        _bootstrap(tree)
        _settle(tree)
        _fill(tree, size_bytes)
        unfinished = work / "image.raw"
        write_bootable_disk(
            tree, unfinished, work, size_bytes=size_bytes, label=_LABEL,
            configuration=_CONFIGURATION,
        )  # fmt: skip
        for stale in directory.glob("debian-*.raw"):
            stale.unlink()
        unfinished.rename(image)
    return image


def _recipe_digest(size_bytes: int) -> str:
    digest = hashlib.sha256(str(size_bytes).encode())
    for path in (Path(__file__), Path(bootable_disk.__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _bootstrap(tree: Path) -> None:
    """Install the packages, from where this machine has its own."""
    release = next(
        line.partition("=")[2].strip('"')
        for line in Path("/etc/os-release").read_text().splitlines()
        if line.startswith("VERSION_CODENAME=")
    )
    targets = run_program(["apt-get", "indextargets", "--format", "$(RELEASE) $(REPO_URI)"])
    mirror = next(
        line.partition(" ")[2] for line in targets.splitlines() if line.startswith(f"{release} ")
    )
    # what it mounts in the tree goes with it, however it ends
    run_program([
        "unshare", "--mount", "debootstrap", "--variant=minbase",
        f"--include={','.join(_PACKAGES)}", release, tree, mirror,
    ])  # fmt: skip


def _settle(tree: Path) -> None:
    """Make of the tree what a published image is: no caches, no identity, nobody can log in."""
    (tree / "etc" / "fstab").write_text(f"LABEL={_LABEL} / ext4 errors=remount-ro 0 1\n")
    (tree / "etc" / "hostname").write_text("debian\n")
    (tree / "etc" / "machine-id").write_text("")
    for pattern in ("var/cache/apt/archives/*.deb", "var/lib/apt/lists/*Packages", "var/log/*.log"):
        for path in tree.glob(pattern):
            path.unlink()


def _fill(tree: Path, size_bytes: int) -> None:
    """Fill the rest of the disk with files of random bytes, which no boot reads."""
    used_bytes = sum(
        os.lstat(Path(folder, name)).st_blocks * 512
        for folder, folders, names in os.walk(tree)
        for name in (*folders, *names)
    )
    rest_bytes = size_bytes - used_bytes - int(size_bytes * _LEFT_FREE_RATIO)
    chance = random.Random(size_bytes)
    folder = tree / "srv" / "data"
    folder.mkdir()
    for number in range(max(0, rest_bytes) // _FILE_BYTES):
        (folder / str(number)).write_bytes(chance.randbytes(_FILE_BYTES))
