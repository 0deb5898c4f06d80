"""A raw disk that a BIOS boots: GRUB, and a tree of files on one ext4 partition.

    sector 0        GRUB's boot.img and the partition table
    sector 1…2047   GRUB's core image with its configuration inside
    sector 2048…    ext4

No mount and no loop device is involved: mkfs.ext4 copies the tree (`-d`) into the image at the
partition's offset, and GRUB's two parts go where their own defaults expect them.
"""

from pathlib import Path

from stratodemo.programs import run_program

_SECTOR_BYTES = 512
_PARTITION_SECTOR = 2048
_GRUB = Path("/usr/lib/grub/i386-pc")
_GRUB_MODULES = ("biosdisk", "part_msdos", "ext2", "linux")


def write_bootable_disk(
    tree: Path, image: Path, work: Path, *, size_bytes: int, label: str, configuration: str
) -> None:
    """Write an image of `size_bytes` whose root partition holds `tree`.

    `configuration` is GRUB's, a script; `work` a folder for files in between. Raises
    `ProgramError`, also when the tree does not fit.
    """
    with image.open("wb") as disk:
        disk.truncate(size_bytes)
    run_program(
        ["sfdisk", "--quiet", str(image)],
        text=f"label: dos\nlabel-id: 0x53747261\nstart={_PARTITION_SECTOR}, type=83, bootable\n",
    )
    _write_boot_loader(image, work, configuration)
    partition_bytes = size_bytes - _PARTITION_SECTOR * _SECTOR_BYTES
    run_program([
        "mkfs.ext4", "-q", "-F", "-m", "0", "-L", label, "-d", str(tree),
        # GRUB 2.06 reads neither of these features.
        "-O", "^metadata_csum_seed,^orphan_file",
        "-E", f"offset={_PARTITION_SECTOR * _SECTOR_BYTES},root_owner=0:0",
        str(image), f"{partition_bytes // 1024}k",
    ])  # fmt: skip


def _write_boot_loader(image: Path, work: Path, configuration: str) -> None:
    script = work / "grub.cfg"
    script.write_text(configuration)
    core = work / "core.img"
    run_program([
        "grub-mkimage", "-O", "i386-pc", "-d", str(_GRUB), "-p", "(hd0,msdos1)/boot/grub",
        "-c", str(script), "-o", str(core), *_GRUB_MODULES,
    ])  # fmt: skip
    core_bytes = core.read_bytes()
    assert len(core_bytes) <= (_PARTITION_SECTOR - 1) * _SECTOR_BYTES
    with image.open("r+b") as disk:
        # Up to byte 440; the disk signature and the partition table follow.
        disk.write((_GRUB / "boot.img").read_bytes()[:440])
        disk.seek(_SECTOR_BYTES)
        disk.write(core_bytes)
