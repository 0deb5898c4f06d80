"""What a late start of `blockd` imports before it serves blocks."""

import subprocess
import sys

HEAVY = ("httpx", "lxml", "xmlsec", "cryptography")


def _loaded_after(program: str) -> list[str]:
    printed = subprocess.run(
        [sys.executable, "-c", f"import sys\n{program}\nprint(*sys.modules)"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return [name for name in HEAVY if name in printed.split()]


def test_serving_blocks_needs_no_network_libraries() -> None:
    """The module that serves blocks loads no HTTP, XML or certificate library; a spare, which has
    the time, loads them all."""
    serving = "from stratocache.fs import blockd"

    assert _loaded_after(serving) == []
    assert _loaded_after(f"{serving}\nblockd.prepare()") == list(HEAVY)
