"""Which process makes targets, for the supervisor: tgtd, which serves them too, or LIO's.

Standard library only. The difference that matters: a dead tgtd answers nobody, the kernel lives on.
So before the FUSE connection ends the kernel's targets on it are suspended, and at a stop all of
them are taken away.
"""

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stratocache.fs import lio_switch
from stratocache.fs.portal import Portal
from stratocache.fs.processes import Launch

log = logging.getLogger(__name__)

_SUSPENSION_S = 10.0
_NO_PORTAL = "127.0.0.2:0"
"""Some free port that nobody knows: without any, tgtd would listen on every address. The real portal
is opened when the targets are there (`Tgt.open_portal`), which ends this one."""
Backend = Literal["tgt", "lio"]


@dataclass(frozen=True)
class TargetProcess:
    """One back end as the supervisor meets it."""

    backend: Backend
    portal: Portal
    program: str
    """What to run as tgtd."""
    control: Path
    """The management socket; somebody listens there when the process is ready."""
    blocks: Path
    """The FUSE mount."""

    def launch(self) -> Launch:
        """Return how the process is started."""
        if self.backend == "tgt":
            return Launch(
                [self.program, "-f", "--iscsi", f"portal={_NO_PORTAL}"],
                {"TGT_IPC_SOCKET": os.fspath(self.control.with_suffix(""))},
            )
        command = [sys.executable, "-m", "stratocache.fs.lio_server", "--control"]
        where = ["--address", self.portal.address, "--port", str(self.portal.port)]
        return Launch([*command, str(self.control), *where])

    def can_listen(self) -> bool:
        """Whether the portal is free, or the kernel's own, which listens for our targets."""
        return self._listens_already() or self.portal.is_free()

    def wait_until_free(self) -> None:
        """Wait for a predecessor to leave the portal; raises what `Portal.wait_until_free` does."""
        if not self._listens_already():
            self.portal.wait_until_free()

    def suspend(self) -> lio_switch.Suspension:
        """Let no error of the FUSE connection, which is about to end, reach an initiator."""
        if self.backend == "tgt":  # whoever calls kills it
            return lio_switch.Suspension([])
        return lio_switch.suspend(self.blocks)

    def clear(self) -> None:
        """Take our targets away, at a stop."""
        if self.backend == "lio":
            lio_switch.suspend(self.blocks).wait(_SUSPENSION_S)
            try:
                lio_switch.remove_all()
            except OSError as error:
                log.error("targets of the kernel stay: %s", error)

    def _listens_already(self) -> bool:
        return self.backend == "lio" and any(lio_switch.groups())
