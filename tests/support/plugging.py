"""For tests of hot plug: what the guest does by itself, and a private libvirt."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from stratocache.api.launch_commands import qemu_command
from support.guests import system_image

PATTERN_BYTES = 1024**2
_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 20.0
_REPORT = re.compile(r"STRATO (?P<key>[a-z0-9_-]+)=(?P<value>.*)")
_NOBODY = 65534

# One step for each disk that comes: read what the step before wrote, write another pattern, and
# wait until the disk is gone. Its serial is what udev makes the name below by-id from: virtio's own
# file, or the only designator of a SCSI disk (page 0x83).
_SCRIPT = """
report ready yes
step=1
while [ "$step" -le @steps@ ]; do
    until path=$(disk 1); do usleep 50000; done
    name=${path##*/}
    serial=$(cat /sys/block/$name/serial 2>/dev/null ||
        tail -c +9 /sys/block/$name/device/vpd_pg83)
    report "read-$step" "$(head -c @bytes@ "$path" | sha256sum | cut -d' ' -f1)"
    yes "step $step" | head -c @bytes@ > /tmp/pattern
    dd if=/tmp/pattern of="$path" bs=64k conv=fsync 2>/dev/null || exit 1
    report "disk-$step" "$name $serial"
    while [ -e "/sys/block/$name" ]; do usleep 50000; done
    report "gone-$step" "$name"
    step=$((step + 1))
done
"""


def plug_script(steps: int) -> str:
    """Return a guest's script that meets so many disks, one after another."""
    return _SCRIPT.replace("@steps@", str(steps)).replace("@bytes@", str(PATTERN_BYTES))


def pattern(step: int) -> bytes:
    """Return what the guest writes to the start of the disk of a step; zeros for step 0."""
    if step == 0:
        return bytes(PATTERN_BYTES)
    line = f"step {step}\n".encode()
    return (line * (PATTERN_BYTES // len(line) + 1))[:PATTERN_BYTES]


def pattern_digest(step: int) -> str:
    """Return the SHA-256 of a step's pattern in hexadecimal."""
    return hashlib.sha256(pattern(step)).hexdigest()


class PrivateLibvirt:
    """A libvirtd with a QEMU driver of its own, run by nobody in a folder of its own (session mode).

    A context manager; its domains end with it. No file of the system's libvirt is touched.
    """

    def __init__(self) -> None:
        # not below pytest's folder, which nobody cannot enter
        self.folder = Path(tempfile.mkdtemp(prefix="libvirt-"))
        self.log = self.folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._domains: list[str] = []

    @property
    def uri(self) -> str:
        """What `virsh --connect` takes."""
        return f"qemu+unix:///session?socket={self.folder}/run/libvirt/libvirt-sock"

    def __enter__(self) -> Self:
        self.folder.chmod(0o755)
        for name in ("run", "config", "cache", "data", "config/libvirt"):
            (self.folder / name).mkdir()
            os.chown(self.folder / name, _NOBODY, _NOBODY)
        os.chown(self.folder, _NOBODY, _NOBODY)
        (self.folder / "config/libvirt/qemu.conf").write_text('stdio_handler = "file"\n')
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.folder),
            "LIBVIRT_LOG_OUTPUTS": f"1:file:{self.log}",
            "LIBVIRT_LOG_FILTERS": "1:qemu 1:secret 2:*",
            **{f"XDG_{name.upper()}_HOME": str(self.folder / name)
               for name in ("config", "cache", "data")},
            "XDG_RUNTIME_DIR": str(self.folder / "run"),
        }  # fmt: skip
        try:
            self._process = subprocess.Popen(
                ["libvirtd", "--timeout", "60"], env=environment, cwd=self.folder,
                user=_NOBODY, group=_NOBODY, extra_groups=[], stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            self._wait(lambda: self._try("list").returncode == 0, "libvirtd does not answer")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def virsh(self, *arguments: str, given: str = "") -> str:
        """Run virsh; it must succeed."""
        done = self._try(*arguments, given=given)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, name: str, script: str, *, ports: int, paused: bool = False) -> None:
        """Start a domain (q35) of the demonstration's image that runs `script`, with PCIe ports."""
        boot, passed = self.folder / "boot.raw", self.folder / "script"
        if not boot.exists():
            subprocess.run(["cp", "--sparse=always", system_image(), boot], check=True)
        passed.write_text(script)
        port = "<controller type='pci' model='pcie-root-port'/>"
        options = ["--paused"] if paused else []
        self.virsh("create", "/dev/stdin", *options, given=f"""
            <domain type='qemu'><name>{name}</name><memory unit='MiB'>256</memory><vcpu>1</vcpu>
            <sysinfo type='fwcfg'>
              <entry name='opt/stratocache/script' file='{passed}'/></sysinfo>
            <os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features>
            <cpu mode='maximum'/><on_reboot>destroy</on_reboot>
            <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
            <disk type='file' device='disk'><driver name='qemu' type='raw'/>
              <source file='{boot}'/><target dev='vda' bus='virtio'/><boot order='1'/><readonly/>
            </disk>
            <controller type='pci' model='pcie-root'/>{port * (ports + 1)}
            <controller type='usb' model='none'/><memballoon model='none'/>
            <serial type='file'><source path='{self._console}'/></serial>
            </devices></domain>""")  # fmt: skip
        self._domains.append(name)

    def wait_for(self, key: str, timeout_s: float) -> str:
        """Wait until the guest reports `key` and return its value."""
        self._wait(lambda: key in self._reports(), f"no report {key}", timeout_s)
        return self._reports()[key]

    def kill_amid(self, name: str, command: str) -> None:
        """Kill a domain's QEMU as soon as somebody runs a virsh command."""
        machine = _pid_of("qemu-system", f"guest={name},", str(self.folder))
        assert machine is not None
        self._wait(
            lambda: _pid_of("virsh", command, self.uri) is not None, f"nobody runs {command}"
        )
        os.kill(machine, signal.SIGKILL)

    @property
    def _console(self) -> Path:
        return self.folder / "console"

    def _reports(self) -> dict[str, str]:
        if not self._console.exists():
            return {}
        text = self._console.read_bytes().decode(errors="replace")
        complete = text.replace("\r", "").split("\n")[:-1]
        found = (_REPORT.search(line) for line in complete)
        return {match["key"]: match["value"] for match in found if match}

    def _try(self, *arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["virsh", "--connect", self.uri, "--quiet", *arguments], check=False,
            capture_output=True, text=True, input=given, timeout=_START_TIMEOUT_S,
        )  # fmt: skip

    def _wait(
        self, happened: Callable[[], bool], what: str, timeout_s: float = _START_TIMEOUT_S
    ) -> None:
        assert self._process is not None
        deadline = time.monotonic() + timeout_s
        while not happened():
            assert self._process.poll() is None, "libvirtd has ended"
            assert time.monotonic() < deadline, f"{what}; console:\n{self._tail()}"
            time.sleep(0.05)

    def _tail(self) -> str:
        return self._console.read_text(errors="replace")[-2000:] if self._console.exists() else ""

    def _stop(self) -> None:
        try:
            if self._process is not None and self._process.poll() is None:
                for name in self._domains:
                    self._try("destroy", name)
                self._process.terminate()
                self._process.wait(_STOP_TIMEOUT_S)
        finally:
            if self._process is not None:
                self._process.kill()
                self._process.wait()
            shutil.rmtree(self.folder)


def _pid_of(program: str, *words: str) -> int | None:
    """Return the process whose command line has all of these, if there is one."""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            shown = process.read_text(errors="replace")
            if program in shown.partition("\0")[0] and all(word in shown for word in words):
                return int(process.parent.name)
    return None


@contextmanager
def paused_qemu(
    *monitors: Path, arguments: Sequence[str] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """Run the machine of `launch --run qemu --qmp`, with more monitors and without starting it."""
    first, *others = monitors
    more = [f"unix:{path},server=on,wait=off" for path in others]
    with subprocess.Popen(
        [*qemu_command(arguments, 64 * 1024**2, "tcg", first), "-S",
         *(argument for monitor in more for argument in ("-qmp", monitor))],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    ) as qemu:  # fmt: skip
        try:
            deadline = time.monotonic() + _START_TIMEOUT_S
            while not all(path.exists() for path in monitors):
                assert qemu.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
            yield qemu
        finally:
            qemu.kill()


def qmp(monitor: Path, command: str, **arguments: Any) -> Any:
    """Execute one QMP command on a monitor of its own and return the answer's `return`."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_START_TIMEOUT_S)
        connection.connect(str(monitor))
        with connection.makefile("rw", encoding="utf-8") as stream:
            assert "QMP" in json.loads(stream.readline())
            for request in ({"execute": "qmp_capabilities"},
                            {"execute": command, "arguments": arguments, "id": 1}):  # fmt: skip
                stream.write(json.dumps(request) + "\n")
                stream.flush()
                while "return" not in (answer := json.loads(stream.readline())):
                    assert "error" not in answer, answer
            return answer["return"]


def seen(monitor: Path) -> set[str]:
    """Return the names of QEMU's block nodes, devices with an id, and objects."""
    nodes = {node["node-name"] for node in qmp(monitor, "query-named-block-nodes")}
    for path in ("/machine/peripheral", "/objects"):
        nodes |= {item["name"] for item in qmp(monitor, "qom-list", path=path)}
    return nodes
