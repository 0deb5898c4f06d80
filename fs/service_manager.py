"""systemd's side of the supervisor: what it is told, and the descriptors it keeps for us.

Standard library only. Sources: sd_notify(3), sd_pid_notify_with_fds(3), sd_listen_fds(3).
"""

import logging
import os
import socket
from collections.abc import Sequence

log = logging.getLogger(__name__)

_FIRST_DESCRIPTOR = 3
_TIMEOUT_S = 5.0


class ServiceManager:
    """Whoever set NOTIFY_SOCKET; does nothing when nobody did.

    What is stored outlives this process, however it ends, and comes back at the next start.
    """

    def __init__(self) -> None:
        address = os.environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address

    def notify(self, *lines: str, descriptors: Sequence[int] = ()) -> None:
        """Send assignments such as `READY=1`."""
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(_TIMEOUT_S)
                sender.connect(self._address)
                socket.send_fds(sender, ["\n".join(lines).encode()], list(descriptors))
        except OSError as error:
            log.warning("the service manager cannot be told %s: %s", lines[0], error)

    def store(self, name: str, descriptor: int) -> None:
        """Let a descriptor outlive us, instead of any that was stored by that name."""
        self.remove(name)
        self.notify("FDSTORE=1", f"FDNAME={name}", descriptors=[descriptor])

    def remove(self, name: str) -> None:
        """Forget what is stored by a name."""
        self.notify("FDSTOREREMOVE=1", f"FDNAME={name}")


def stored_descriptors() -> dict[str, int]:
    """Return the descriptors that came back, by name; they are not for our children. Works once."""
    process = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    os.environ.pop("LISTEN_PIDFDID", None)
    if process != str(os.getpid()) or not count.isdecimal():
        return {}
    found: dict[str, int] = {}
    for descriptor in range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + int(count)):
        os.set_inheritable(descriptor, False)
        name = names.pop(0) if names else ""
        if name in found:
            os.close(found[name])  # the later one was stored later
        found[name] = descriptor
    return found
