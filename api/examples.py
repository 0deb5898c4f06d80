"""Examples at the end of a command's help and of its manual page."""

HEADING = "Examples:"


def examples(*lines: str) -> str:
    """Return the epilog of a command; each line is one that can be typed."""
    return "\n".join(["\b", HEADING, *(f"  {line}" for line in lines)])  # \b: not to be wrapped
