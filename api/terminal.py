"""What standard output is: a terminal or not, with colours or without."""

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def is_terminal(*, errors: bool = False) -> bool:
    """Tell whether somebody looks at standard output, or at standard error."""
    return (sys.stderr if errors else sys.stdout).isatty()


def has_colours() -> bool:
    """Tell whether a terminal is to be coloured (https://no-color.org, and `TERM=dumb`)."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") not in ("dumb", "unknown")


def console(*, errors: bool = False) -> "Console":
    """Return what draws on standard output, or on standard error."""
    from rich.console import Console

    if has_colours():
        return Console(stderr=errors)
    return Console(stderr=errors, color_system=None)
