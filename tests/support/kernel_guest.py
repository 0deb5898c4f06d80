"""A guest with Debian's own kernel whose user land is this machine's: for what needs a kernel.

The guest boots an initramfs of busybox and modules, sees this machine's root directory read-only
through 9p with a layer of unpacked packages and a tmpfs over it (overlayfs), and runs
`support.guest_agent` there. `build/guest` keeps the packages and the initramfs.
"""

import compileall
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

from stratodemo.guest import Guest
from stratodemo.kernel_modules import write_modules_dep
from stratodemo.packages import obtain, obtain_kernel, unpack
from stratodemo.programs import run_program

from support import guest_agent
from support.appliance import free_port
from support.guests import REPOSITORY

_STORE = REPOSITORY / "build" / "guest"
_INIT = Path(__file__).parent / "kernel_guest_init"
# What no Debian machine need have, laid over this machine's root in the guest.
_PACKAGES = ("open-iscsi", "libisns0", "libopeniscsiusr", "libkmod2", "kmod", "udev")
_EARLY = ("virtio_pci", "virtio_net", "virtio_blk", "9pnet_virtio", "9p", "overlay", "qemu_fw_cfg")
_MODULES = (
    *_EARLY, "ext4", "fuse", "loop", "crc32c_generic", "crct10dif_generic", "crc64_rocksoft_generic",
    "sd_mod", "iscsi_tcp", "configfs", "target_core_mod", "target_core_file", "iscsi_target_mod",
)  # fmt: skip
_BOOT_TIMEOUT_S = 400.0
_COMPILED = ("api", "cache", "fs", "packaging/src", "packaging/demo", "tests/support")
DATA = Path("/data")
"""A file system of the guest's own, ext4 on a disk."""
DATA_BYTES = 1024**3

_P = ParamSpec("_P")
_T = TypeVar("_T")


class KernelGuest:
    """One such guest; a context manager. `ports` are the guest's that the host may connect to."""

    def __init__(self, folder: Path, *ports: int, memory_mib: int = 1024) -> None:
        self._folder = folder
        self._forwards = {port: free_port() for port in ports}
        self._agent = free_port()
        self._memory_mib = memory_mib
        self.machine: Guest | None = None

    def port(self, guest_port: int) -> int:
        """Return the port of this machine's loopback that leads to a port of the guest."""
        return self._forwards[guest_port]

    def call(self, function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
        """Call a module's function in the guest; see `guest_agent.call`."""
        return guest_agent.call(self._agent, function, *arguments, **named)

    def run(self, *command: str, timeout_s: float = 120.0) -> str:
        """Run a program in the guest, which must succeed, and return what it printed."""
        done = self.call(guest_agent.run, list(command), timeout_s)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def console(self) -> str:
        """Return the end of the console, for messages."""
        assert self.machine is not None
        return "\n".join(line.text for line in self.machine.console[-40:])

    def __enter__(self) -> Self:
        kernel, initramfs, layer = prepare()
        for part in _COMPILED:  # emulated, it takes a minute
            compileall.compile_dir(REPOSITORY / part, quiet=1)
        data = self._folder / "data.raw"
        with data.open("wb") as file:
            file.truncate(DATA_BYTES)
        run_program(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1", data])
        rules = "".join(
            f",hostfwd=tcp:127.0.0.1:{host}-:{guest}"
            for guest, host in {**self._forwards, _AGENT_PORT: self._agent}.items()
        )
        arguments = [
            "-smp", "2", "-kernel", str(kernel), "-initrd", str(initramfs),
            "-append", "console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on no_timer_check",
            "-netdev", f"user,id=net{rules}", "-device", "virtio-net-pci,netdev=net,romfile=",
            *_shared("host", Path("/")), *_shared("layer", layer),
            "-drive", f"if=none,id=data,format=raw,discard=unmap,file={data}",
            "-device", "virtio-blk-pci,drive=data",
        ]  # fmt: skip
        self.machine = Guest(arguments, _script(), name="kernel-guest", memory_mib=self._memory_mib)
        self.machine.__enter__()
        try:
            self.machine.wait_for("agent", _BOOT_TIMEOUT_S)
        except BaseException:
            self.machine.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self.machine is not None
        self.machine.__exit__(kind, error, trace)


_AGENT_PORT = 7000


def _shared(tag: str, folder: Path) -> list[str]:
    """Return QEMU's arguments that show a folder of this machine, read-only."""
    options = "security_model=none,readonly=on,multidevs=remap"
    return ["-virtfs", f"local,path={folder},mount_tag={tag},{options}"]


def _script() -> str:
    """Return what the initramfs runs: the layers of the root, then the agent in it."""
    path = os.pathsep.join(sys.path)
    return f"""
python={sys.executable}
PYTHONPATH='{path}'
port={_AGENT_PORT}
export PYTHONPATH
. /enter
"""


def prepare() -> tuple[Path, Path, Path]:
    """Return kernel, initramfs and layer, made when the recipe or a package is new."""
    store = _STORE / "packages"
    kernel_package = obtain_kernel(store, "linux-image-amd64")
    busybox = obtain("busybox-static", store)
    packages = [obtain(name, store) for name in _PACKAGES]
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(_INIT.iterdir()):
        digest.update(path.read_bytes())
    digest.update("".join(path.name for path in (kernel_package, busybox, *packages)).encode())
    made = _STORE / digest.hexdigest()[:12]
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=_STORE, prefix="making-") as work_name:
            work = Path(work_name)
            unpack(kernel_package, work / "kernel")
            unpack(busybox, work / "busybox")
            unfinished = work / "made"
            for package in packages:
                unpack(package, unfinished / "layer")
            for name in ("bin", "lib", "sbin"):  # links in the root that this is laid over
                shutil.copytree(
                    unfinished / "layer" / name, unfinished / "layer/usr" / name,
                    symlinks=True, dirs_exist_ok=True,
                )  # fmt: skip
                shutil.rmtree(unfinished / "layer" / name)
            shutil.copy2(next((work / "kernel/boot").glob("vmlinuz-*")), unfinished / "vmlinuz")
            _write_initramfs(work, unfinished / "initramfs")
            for stale in _STORE.iterdir():
                if stale not in (store, work):
                    shutil.rmtree(stale)
            unfinished.rename(made)
    return made / "vmlinuz", made / "initramfs", made / "layer"


def _write_initramfs(work: Path, archive: Path) -> None:
    root = work / "root"
    (root / "bin").mkdir(parents=True)
    shutil.copy2(work / "busybox/bin/busybox", root / "bin/busybox")
    for path in _INIT.iterdir():
        shutil.copyfile(path, root / path.name)
        (root / path.name).chmod(0o755)
    source = next((work / "kernel/lib/modules").iterdir())
    target = root / "lib/modules" / source.name
    write_modules_dep(source)
    for line in (source / "modules.dep").read_text().splitlines():
        name, _, needed = line.partition(":")
        if Path(name).stem.replace("-", "_") in {wanted.replace("-", "_") for wanted in _MODULES}:
            for part in (name, *needed.split()):
                (target / part).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source / part, target / part)
    write_modules_dep(target)
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    packed = ["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0", "-O", str(archive)]
    subprocess.run(packed, input="\n".join(names).encode(), cwd=root, check=True)
