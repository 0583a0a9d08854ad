"""What lies in a host's pool: VMs, the cache, and what belongs to nothing."""

import os
import time
from pathlib import Path
from uuid import UUID

import pytest

from leveret.compute.libvirt_driver.paths import Pool

pytestmark = pytest.mark.unit

VM, GONE = UUID(int=1), UUID(int=2)


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    """A pool as it is while one VM runs and an image is fetched."""
    pool = Pool(tmp_path)
    pool.make()
    pool.vm(VM).directory.mkdir()
    pool.image("a" * 64, "qcow2").touch()
    (pool.images / f".{'b' * 64}.raw.17.c0ffee.tmp").touch()
    (pool.dhcp / "default").mkdir(parents=True)
    (pool.dhcp / "default" / str(VM)).touch()
    (pool.dhcp / "default" / f".{GONE}").touch()
    (pool.root / "kvm-probe.json").touch()
    (pool.root / "lost+found").mkdir()
    return pool


def test_a_pool_at_work_holds_nothing_that_belongs_to_nothing(pool: Pool) -> None:
    assert pool.leftovers(10) == ()
    assert pool.vms() == {VM}


def test_whatever_else_lies_there_is_told_by_its_path(pool: Pool) -> None:
    (pool.root / str(VM).upper().replace("-", "_")).mkdir()
    (pool.dhcp / "default" / str(GONE)).touch()
    (pool.images / "debian.iso").touch()
    old = pool.images / ".left.tmp"
    old.touch()
    os.utime(old, (time.time() - 86_400,) * 2)
    expected = {str(VM).replace("-", "_"), f"dhcp/default/{GONE}", "images/debian.iso", "images/.left.tmp"}
    assert set(pool.leftovers(10)) == expected
    assert len(pool.leftovers(3)) == 3
