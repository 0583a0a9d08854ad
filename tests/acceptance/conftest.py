"""One installation for all who only want to use one."""

from collections.abc import Iterator

import pytest
from installation import Installation, installed

from leveret.stack.layout import Options


@pytest.fixture(scope="session")
def house() -> Iterator[Installation]:
    """Two conductors and room for a thousand simulated VMs. Who uses it cleans up, and breaks nothing."""
    with installed(Options(conductors=2, fake_hosts=16, libvirt=False)) as installation:
        yield installation
