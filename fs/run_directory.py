"""RUN_DIR: where an appliance's sockets, mount and live bitmaps are, and who may use it now.

Standard library only, as the supervisor uses it.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from stratocache.cache.errors import Conflict, InvalidInput

_SOCKET_PATH_BYTES_MAX = 107  # sun_path of unix(7) without its terminator
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class RunDirectory:
    """The names in one RUN_DIR."""

    path: Path

    @property
    def blocks(self) -> Path:
        """The FUSE mount."""
        return self.path / "blocks"

    @property
    def live(self) -> Path:
        """Live bitmaps; hold for as long as the kernel runs."""
        return self.path / "live"

    @property
    def counts(self) -> Path:
        """What processes count for /metrics (`counts`)."""
        return self.path / "counts"

    @property
    def init_request(self) -> Path:
        """The FUSE_INIT request of the present connection, for who serves it."""
        return self.path / "fuse-init"

    @property
    def api_socket(self) -> Path:
        """Where the API listens."""
        return self.path / "api.sock"

    @property
    def poke_socket(self) -> Path:
        """Where `blockd` is told to look."""
        return self.path / "poke.sock"

    @property
    def tgt_control(self) -> Path:
        """tgtd's management socket: TGT_IPC_SOCKET with the control port, 0, behind it."""
        return self.path / "tgtd.0"

    @property
    def lio_control(self) -> Path:
        """The socket of the process that makes LIO's targets."""
        return self.path / "lio.sock"

    @property
    def supervisor_status(self) -> Path:
        """What the supervisor says about itself (`supervisor_status`)."""
        return self.path / "supervisor.json"

    @property
    def upgrade_request(self) -> Path:
        """What `stratocache upgrade` wants (`upgrade`)."""
        return self.path / "upgrade.json"

    def require_short(self) -> None:
        """Raise `InvalidInput` (`run-dir-too-long`) unless sockets can have their names in here."""
        if len(os.fsencode(self.poke_socket)) > _SOCKET_PATH_BYTES_MAX:
            raise InvalidInput(
                "run-dir-too-long",
                f"{self.path} is too long for sockets in it; choose a shorter run_dir.",
                field="run_dir",
            )

    def prepare(self, *others: Path | None) -> None:
        """Make what is missing, and the other directories, private ones; change nothing else.

        Raises `InvalidInput` (`run-dir-too-long`, `directory-unusable`).
        """
        self.require_short()
        try:
            self.path.mkdir(mode=0o755, parents=True, exist_ok=True)
            self.live.mkdir(mode=0o700, exist_ok=True)
            self.counts.mkdir(mode=0o700, exist_ok=True)
            for other in others:
                if other is not None:
                    other.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput(
                "directory-unusable",
                f"{error.filename} cannot be made ({error.strerror}); change the directory or run "
                "as root.",
            ) from error

    @contextmanager
    def lock(self, inherited: int | None = None) -> Iterator[int]:
        """Be the only supervisor here; give the lock's descriptor.

        `inherited` is a descriptor that has the lock already. Raises `Conflict` (`already-running`).
        """
        descriptor = inherited if inherited is not None else self._open_lock()
        try:
            if inherited is None:
                self._take_lock(descriptor)
                self._forget_other_boot()
            yield descriptor
        finally:
            os.close(descriptor)

    def _open_lock(self) -> int:
        return os.open(self.path / "serve.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def _take_lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip()
            raise Conflict(
                "already-running",
                f"Another Stratocache (process {holder or 'unknown'}) uses {self.path}; stop "
                "it or choose another run_dir.",
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)

    def _forget_other_boot(self) -> None:
        """Remove live bitmaps of before a reboot, should RUN_DIR not be on a tmpfs."""
        boot = _BOOT_ID.read_text()
        mark = self.path / "boot-id"
        with suppress(FileNotFoundError):
            if mark.read_text(errors="replace") == boot:
                return
        for bitmap in self.live.iterdir():
            bitmap.unlink()
        mark.write_text(boot)

    def remove_leftovers(self) -> None:
        """Remove the sockets and files that dead processes left, but for the API's socket."""
        lock = self.tgt_control.with_name(self.tgt_control.name + ".lock")
        sockets = (self.poke_socket, self.tgt_control, self.lio_control)
        for path in (*sockets, lock, self.supervisor_status, self.upgrade_request):
            path.unlink(missing_ok=True)
