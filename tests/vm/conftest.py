"""The kernel guest, booted once for all tests of this folder that need one."""

from collections.abc import Iterator

import pytest
from support.kernel_guest import KernelGuest
from support.lio_guest import PORT


@pytest.fixture(scope="package")
def kernel_guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelGuest]:
    """A guest with Debian's kernel and this machine's programs."""
    with KernelGuest(tmp_path_factory.mktemp("kernel-guest"), PORT) as guest:
        yield guest
