"""The supervisor's own upgrade: asked for by SIGHUP, it ends in another program.

`Upgrading` takes the steps of `upgrade_steps` one by one, on both sides of the re-execution.
Standard library only. `SUPERVISOR.md`, "Upgrade".
"""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stratocache import __version__
from stratocache.cache.errors import Internal, InvalidInput
from stratocache.fs import handover, upgrade_steps
from stratocache.fs.crew import Crew
from stratocache.fs.upgrade import Progress, UpgradeRecord, UpgradeRequest

log = logging.getLogger(__name__)


class Upgrading:
    """At most one upgrade at a time; `asked` is set by the signal."""

    def __init__(self, crew: Crew, request_path: Path, config_json: Path) -> None:
        self.asked = False
        self.record: UpgradeRecord | None = None
        """The last one that was asked for."""
        self._crew = crew
        self._request_path = request_path
        self._config_json = config_json
        self._request: UpgradeRequest | None = None
        self._steps: Iterator[None] | None = None

    @property
    def active(self) -> bool:
        """Whether there is a next step."""
        return self._steps is not None

    def advance(self) -> bool:
        """Do the next step, if any; return whether the new code has agreed to be executed."""
        if self._steps is None and self.asked:
            self.asked = False
            self._begin()
        if self._steps is None or self.record is None:
            return False
        try:
            next(self._steps)
        except StopIteration:
            self._steps = None
            return self.record.progress is Progress.CHECKING
        return False

    def _begin(self) -> None:
        try:
            self._request = UpgradeRequest.take(self._request_path)
        except (InvalidInput, OSError) as error:
            log.error("SIGHUP: %s", error)
            return
        self.record = UpgradeRecord(self._request.id, __version__)
        self._steps = upgrade_steps.checking(self._request, self.record, self._config_json)

    def execute(self, state: Mapping[str, Any], descriptors: Iterable[int]) -> None:
        """Become the new code, with `state` and `descriptors`; returns only when that fails."""
        request, record = self._request, self.record
        assert request is not None
        assert record is not None
        ours = {"upgrade": asdict(record), "tgtd": request.tgtd}
        try:
            handover.execute(
                [request.python, *sys.orig_argv[1:]],
                request.environment,
                {**state, **ours},
                descriptors,
            )
        except OSError as error:
            sentence = f"{request.python} cannot be executed: {error}; nothing was changed."
            upgrade_steps.fail(record, Internal("code-missing", sentence))

    def resume(self, handed: Mapping[str, Any], fault: Callable[[], str]) -> None:
        """Go on as the new code; `fault` as in `upgrade_steps.rolling`."""
        self.asked = handed["asked"]
        self.record = UpgradeRecord.from_json(handed["upgrade"])
        self.record.to_version = __version__
        self.record.progress = Progress.ROLLING
        self._steps = upgrade_steps.rolling(self._crew, handed["tgtd"], self.record, fault)
