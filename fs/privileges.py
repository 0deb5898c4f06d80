"""Which process of the appliance may do what; `api/THREATS.md` has the table. Standard library only."""

from pathlib import Path

from stratocache.fs.confinement import (
    CAP_IPC_LOCK,
    CAP_NET_BIND_SERVICE,
    CAP_SYS_RESOURCE,
    SYSTEM_PATHS,
    Confinement,
    everything_readable,
)

_ANY_PORT = 0
"""Binding to it finds out whether an address is this host's."""


class Privileges:
    """The confinement of each kind of child; `configured` are folders of files that are configured."""

    def __init__(
        self, state_dir: Path, run_dir: Path, portal_port: int, configured: tuple[str, ...]
    ) -> None:
        self._own = (str(state_dir), str(run_dir))
        self._readable = (*SYSTEM_PATHS, *configured)
        self._portal = portal_port

    def of_blockd(self) -> Confinement:
        """Reads what catalogues of files name, locks its memory, connects to origins."""
        return Confinement(
            frozenset({CAP_IPC_LOCK}), everything_readable(), self._own, frozenset({_ANY_PORT})
        )

    def of_tgtd(self) -> Confinement:
        """Listens on the portal, has many files open, and is not to be killed for memory."""
        return Confinement(
            frozenset({CAP_IPC_LOCK, CAP_SYS_RESOURCE, CAP_NET_BIND_SERVICE}), self._readable,
            self._own, frozenset({_ANY_PORT, self._portal}), frozenset(),
        )  # fmt: skip

    def of_server(self, name: str) -> Confinement:
        """Answers requests on a socket that it gets; what serves the network may ask who issues
        tokens, the others connect to the portal alone, to see that it is there."""
        connects = None if name == "web" else frozenset({self._portal} if name == "api" else ())
        return Confinement(frozenset(), self._readable, self._own, frozenset(), connects)

    def of_holder(self) -> Confinement:
        """Kills one process that it is given."""
        return Confinement(frozenset(), self._readable, (), frozenset(), frozenset(), signals=True)
