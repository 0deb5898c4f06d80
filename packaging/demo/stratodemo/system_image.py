"""The bootable demonstration image: Debian's kernel, busybox and e2fsprogs on one ext4 partition,
with /boot, /bin/busybox, /lib/modules and /sbin/init.
"""

import gzip
import hashlib
import shutil
import tempfile
from pathlib import Path

from stratodemo import bootable_disk
from stratodemo.bootable_disk import write_bootable_disk
from stratodemo.kernel_modules import write_modules_dep
from stratodemo.packages import obtain, obtain_kernel, unpack
from stratodemo.programs import run_program

IMAGE_BYTES = 320 * 1024**2
ROOT_LABEL = "stratocache-root"

_RECIPE = Path(__file__).parent / "system"
# no_timer_check: a busy host does not give the emulated timer its turn in time, Linux panics over it
_KERNEL_COMMAND_LINE = (
    "console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on no_timer_check"
)
_GRUB_CONFIGURATION = f"""\
set root=(hd0,msdos1)
linux /boot/vmlinuz {_KERNEL_COMMAND_LINE}
initrd /boot/initramfs
boot
"""
# mke2fs and the libraries it is linked with, so that guests can make journalled file systems.
_FILE_SYSTEM_TOOLS = ("e2fsprogs", "libext2fs2", "libcom-err2", "libblkid1", "libuuid1", "libc6")
_INITRAMFS_MODULES = ("virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod")
_FOLDERS = ("bin", "dev", "etc", "mnt", "proc", "root", "run", "sbin", "sys", "tmp", "usr", "var")


def build_system_image(directory: Path) -> Path:
    """Return a raw bootable image in `directory`, made anew only when its recipe changed.

    Packages are kept in `directory/packages`. Raises `ProgramError` when a package cannot be had or
    a tool fails; no half-made image stays.
    """
    store = directory / "packages"
    kernel = obtain_kernel(store)
    userland = [obtain(name, store) for name in ("busybox-static", *_FILE_SYSTEM_TOOLS)]
    image = directory / f"system-{_recipe_digest([kernel, *userland])}.raw"
    if image.exists():
        return image
    with tempfile.TemporaryDirectory(dir=directory, prefix="system-") as work_name:
        work = Path(work_name)
        unpack(kernel, work / "kernel")
        for package in userland:
            unpack(package, work / "userland")
        tree = _root_tree(work)
        unfinished = work / "image.raw"
        write_bootable_disk(
            tree, unfinished, work, size_bytes=IMAGE_BYTES, label=ROOT_LABEL,
            configuration=_GRUB_CONFIGURATION,
        )  # fmt: skip
        for stale in directory.glob("system-*.raw*"):
            stale.unlink()
        unfinished.rename(image)
    return image


def compress(image: Path) -> Path:
    """Return `image` compressed by gzip (`.gz` beside it), made once."""
    target = image.with_name(image.name + ".gz")
    if target.exists():
        return target
    unfinished = target.with_name(target.name + ".part")
    with (
        image.open("rb") as source,
        unfinished.open("wb") as sink,
        # No name and no time in the header: the same image gives the same bytes.
        gzip.GzipFile("", "wb", 6, sink, mtime=0) as packed,
    ):
        shutil.copyfileobj(source, packed, 1024**2)
    unfinished.rename(target)
    return target


def _recipe_digest(packages: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in (Path(__file__), Path(bootable_disk.__file__), *sorted(_RECIPE.iterdir())):
        digest.update(path.read_bytes())
    digest.update("".join(package.name for package in packages).encode())
    return digest.hexdigest()[:12]


def _root_tree(work: Path) -> Path:
    tree = work / "root"
    for folder in _FOLDERS:
        (tree / folder).mkdir(parents=True)
    busybox = work / "userland" / "bin" / "busybox"
    shutil.copy2(busybox, tree / "bin" / "busybox")
    _link_applets(busybox, tree)
    _copy_file_system_tools(work / "userland", tree)
    modules = next((work / "kernel" / "lib" / "modules").iterdir())
    shutil.copytree(modules, tree / "lib" / "modules" / modules.name)
    write_modules_dep(tree / "lib" / "modules" / modules.name)
    (tree / "boot").mkdir()
    shutil.copy2(next((work / "kernel" / "boot").glob("vmlinuz-*")), tree / "boot" / "vmlinuz")
    _write_initramfs(tree, work)
    _install(_RECIPE / "init", tree / "sbin" / "init")
    _install(_RECIPE / "stratocache.sh", tree / "etc" / "stratocache.sh")
    return tree


def _link_applets(busybox: Path, tree: Path) -> None:
    for applet in run_program([busybox, "--list"]).split():
        # Our own init and the real mke2fs take these places.
        if applet not in ("busybox", "init", "mke2fs"):
            (tree / "bin" / applet).symlink_to("busybox")


def _copy_file_system_tools(userland: Path, tree: Path) -> None:
    for name in ("mke2fs", "mkfs.ext4", "e2fsck"):
        shutil.copy2(userland / "sbin" / name, tree / "sbin" / name, follow_symlinks=False)
    shutil.copy2(userland / "etc" / "mke2fs.conf", tree / "etc" / "mke2fs.conf")
    libraries = tree / "lib" / "x86_64-linux-gnu"
    libraries.mkdir(parents=True)
    wanted = ("libext2fs", "libcom_err", "libblkid", "libuuid", "libe2p", "libc", "libpthread")
    for folder in ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"):
        for path in (userland / folder).glob("*.so*"):
            if path.name.split(".so")[0] in wanted:
                shutil.copy2(path, libraries / path.name, follow_symlinks=False)
    (tree / "lib64").mkdir()
    shutil.copy2(
        userland / "lib" / "x86_64-linux-gnu" / "ld-linux-x86-64.so.2",
        tree / "lib64" / "ld-linux-x86-64.so.2",
    )


def _write_initramfs(tree: Path, work: Path) -> None:
    """Pack busybox, the first script and the disk drivers as a cpio archive in /boot."""
    early = work / "early"
    (early / "bin").mkdir(parents=True)
    shutil.copy2(tree / "bin" / "busybox", early / "bin" / "busybox")
    _install(_RECIPE / "initramfs-init", early / "init")
    modules = next((tree / "lib" / "modules").iterdir())
    target = early / "lib" / "modules" / modules.name
    target.mkdir(parents=True)
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, needed = line.partition(":")
        if Path(path).stem not in _INITRAMFS_MODULES:
            continue
        for part in (path, *needed.split()):
            (target / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(modules / part, target / part)
    write_modules_dep(target)
    names = sorted(str(path.relative_to(early)) for path in early.rglob("*"))
    archive = tree / "boot" / "initramfs"
    run_program(
        ["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0", "-O", archive.resolve()],
        text="\n".join(names),
        directory=early,
    )


def _install(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    target.chmod(0o755)
