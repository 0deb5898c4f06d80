"""`make demo`: see README.md; tells and checks the whole story on this machine, as root."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from stratodemo.guest import GuestError
from stratodemo.narration import Narrator, StepFailed
from stratodemo.programs import ProgramError
from stratodemo.site import Site
from stratodemo.story import PREPARATION, Story

_IMAGES = Path(__file__).resolve().parents[2] / "build" / "demo"
_PREPARATION = _IMAGES / "preparation.json"


def main() -> int:
    """Play the story; print `demo: ok` and return 0, or say what failed and return 1."""
    if os.geteuid() != 0:
        print("demo: failed: FUSE mounts and loop devices need root; run it as root.")
        return 1
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    _IMAGES.mkdir(parents=True, exist_ok=True)
    built = not any(_IMAGES.glob("system-*.raw.gz"))
    narrator, begun = Narrator(), time.monotonic()
    logs: Path | None = None
    tails = ""
    try:
        with Site() as site:
            logs = site.logs
            try:
                Story(narrator, site, _IMAGES).tell()
            except BaseException:
                tails = site.log_tails()
                raise
    except (StepFailed, GuestError, ProgramError, OSError, KeyboardInterrupt) as error:
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        print(f"\n{tails}\n\nLogs are kept in {logs}", flush=True)
        print(f"demo: failed at: {narrator.current_step}: {reason}")
        return 1
    print(f"\nAll of it took {time.monotonic() - begun:.0f} s.")
    _compare_preparation(narrator, built=built)
    print("demo: ok")
    return 0


def _compare_preparation(narrator: Narrator, *, built: bool) -> None:
    """Say what the images cost, now or in the earlier run that built them."""
    now_s = sum(narrator.durations_s[step] for step in PREPARATION)
    if built:
        _PREPARATION.write_text(json.dumps({"seconds": now_s}))
        print(f"The images stay in {_IMAGES}; the next run saves the {now_s:.0f} s of making them.")
        return
    try:
        before_s = float(json.loads(_PREPARATION.read_text())["seconds"])
    except (OSError, ValueError, KeyError):
        return
    print(
        f"The images were kept from an earlier run: {now_s:.2f} s instead of {before_s:.1f} s, "
        f"so this run was {before_s - now_s:.1f} s faster."
    )


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
