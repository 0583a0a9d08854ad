"""What lies in a host's pool: VMs, the cache, and what belongs to nothing."""

import os
import time
from pathlib import Path
from uuid import UUID

import pytest

from leveret.compute.libvirt_driver.paths import PROBE, Pool
from leveret.compute.libvirt_driver.pool_probe import probe

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


def test_of_the_images_in_the_cache_those_used_last_are_told_first(pool: Pool) -> None:
    for name, used_at in (("c", 300), ("d", 100), ("e", 200)):
        path = pool.image(name * 64, "raw")
        path.touch()
        os.utime(path, (used_at, used_at))
    pool.image("d" * 64, "qcow2").touch()  # the same content, read in another way, just now
    os.utime(pool.image("a" * 64, "qcow2"), (50, 50))
    assert pool.cached(10) == ("d" * 64, "c" * 64, "e" * 64, "a" * 64)
    assert pool.cached(2) == ("d" * 64, "c" * 64)


def test_a_pool_is_tried_with_a_file_that_goes_again_even_when_a_killed_worker_left_it(pool: Pool) -> None:
    (pool.root / PROBE).write_bytes(b"half of")
    assert pool.leftovers(10) == ()
    probe(pool.root / PROBE)
    assert not (pool.root / PROBE).exists()


def test_a_pool_that_is_not_there_or_takes_no_file_fails_the_try(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        probe(tmp_path / "gone" / PROBE)
    (tmp_path / PROBE).symlink_to("/dev/null")
    with pytest.raises(OSError, match="symbolic"):
        probe(tmp_path / PROBE)


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
