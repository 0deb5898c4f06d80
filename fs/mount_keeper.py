"""The FUSE mount over the deaths of those who serve it: kept, continued, or made anew.

Standard library only. `SUPERVISOR.md`, "Deaths".
"""

import logging
import os
import signal

from stratocache.fs.crew import STOP_TIMEOUT_S, Crew
from stratocache.fs.fuse_mount import FuseMount, unmount_stale
from stratocache.fs.run_directory import RunDirectory
from stratocache.fs.service_manager import ServiceManager

log = logging.getLogger(__name__)

STORED_AS = "fuse"


class MountKeeper:
    """Sets `crew.mount`; `resend=False` recovers as on kernels without FUSE_NOTIFY_RESEND."""

    def __init__(
        self, crew: Crew, directory: RunDirectory, manager: ServiceManager, *, resend: bool
    ) -> None:
        self._crew = crew
        self._directory = directory
        self._manager = manager
        self._resend = resend

    def begin(self, stored: int | None) -> None:
        """Go on with a connection that the service manager kept, else mount.

        Raises what `Portal.wait_until_free`, `unmount_stale` and `FuseMount.create` raise.
        """
        self._crew.mount = self._stored(stored)
        if self._crew.mount is not None:
            return  # the portal may be taken still: by a tgtd that waits for our blockd
        self._crew.target.suspend()
        unmount_stale(self._directory.blocks)
        self._directory.blocks.mkdir(mode=0o755, exist_ok=True)
        self._crew.target.wait_until_free()
        self._mount()

    def _stored(self, descriptor: int | None) -> FuseMount | None:
        if descriptor is None:
            return None
        mount = None
        if self._resend:
            mount = FuseMount.adopt(
                self._directory.blocks, self._directory.init_request, descriptor
            )
        if mount is None:
            os.close(descriptor)
            return None
        log.info("the FUSE connection was kept and goes on")
        mount.resend()
        return mount

    def resume(self, descriptor: int) -> None:
        """Go on with what we had before our re-execution."""
        self._crew.mount = FuseMount(
            self._directory.blocks, self._directory.init_request, descriptor
        )

    def _mount(self) -> None:
        mount = FuseMount.create(self._directory.blocks, self._directory.init_request)
        self._crew.mount = mount
        self._manager.store(STORED_AS, mount.descriptor)

    def recover(self) -> None:
        """After the end of `blockd`: let the next continue the connection, or give it a new one."""
        mount, tgtd = self._crew.mount, self._crew.tgtd
        assert mount is not None
        if self._resend and mount.can_resend and mount.connected:
            try:
                mount.resend()
            except OSError as error:
                log.error("the kernel does not send requests again: %s", error)
            else:
                return
        suspension = self._crew.target.suspend()
        tgtd.send(signal.SIGKILL)  # first: it must not see the errors of the abort
        mount.unmount()
        self._crew.mount = None
        if not tgtd.wait(STOP_TIMEOUT_S):
            log.error("tgtd does not end; its sessions may see errors")
        suspension.wait(STOP_TIMEOUT_S)
        unmount_stale(self._directory.blocks)
        self._crew.drop_spare()
        self._mount()

    def replace_lost(self) -> None:
        """Somebody unmounted or aborted by force: begin anew with a `blockd` of the new mount."""
        blockd = self._crew.blockd
        if not blockd.running:
            self.recover()
        elif not blockd.wait(0):
            log.error("the FUSE connection was aborted from outside")
            blockd.send(signal.SIGKILL)
            blockd.wait(STOP_TIMEOUT_S)  # it cannot linger on a connection that is gone

    def end(self) -> None:
        """Abort and unmount."""
        self._manager.remove(STORED_AS)
        if self._crew.mount is not None:
            self._crew.mount.unmount()
            self._crew.mount = None
