"""The main job, end to end: what `make demo` runs, played once with every layer real."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vm, pytest.mark.root, pytest.mark.slow]

_DEMO = Path(__file__).resolve().parents[2] / "packaging" / "demo" / "demo.py"
_TIMEOUT_S = 360


@pytest.mark.timeout(_TIMEOUT_S + 30)
def test_demonstration_succeeds(tmp_path: Path) -> None:
    """A reference becomes a VM with a disk that outlives it, and nothing of it stays behind."""
    # a directory for temporary files may be too long for sockets in it
    temporary = tmp_path / ("long" * 20)
    temporary.mkdir()
    result = subprocess.run(
        [sys.executable, _DEMO],
        check=False, capture_output=True, text=True, timeout=_TIMEOUT_S,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR": str(temporary), "HOME": "/root"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "demo: ok"
    assert "times faster" in result.stdout
    assert list(temporary.iterdir()) == []
    assert list(Path("/run").glob("stratocache-demo-*")) == []
