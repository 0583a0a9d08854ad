"""Real guests, through the command line and every process, on a libvirt of the test's own."""

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from installation import Installation, installed
from peers import eventually

from leveret.client import Leveret, config
from leveret.shared.documents import CreateVm, ImageByName, ImageByUrl, VmView
from leveret.shared.errors import Code
from leveret.shared.ids import new_id
from leveret.shared.lifecycle import State
from leveret.stack.layout import Options
from leveret.stack.libvirtd import Libvirtd, virsh

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="a private libvirtd needs root"),
]

LEVERET = str(Path(sys.executable).with_name("leveret"))


#: A disk that only has `cli; hlt; jmp` to boot: a guest that runs for ever and needs no CPU for it.
IDLE = b"\xfa\xf4\xeb\xfd".ljust(510, b"\0") + b"\x55\xaa" + bytes(1024 * 1024 - 512)


@pytest.fixture(scope="module")
def house(appliance: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    images = tmp_path_factory.mktemp("images")
    for file in appliance.parent.glob(f"{appliance.name}*"):
        shutil.copy(file, images)
    idle = images / "idle.raw"
    idle.write_bytes(IDLE)
    options = Options(conductors=1, libvirt=True, virt_type="qemu", image_dir=str(images))
    with installed(options) as installation:
        asyncio.run(
            installation.query(
                "INSERT INTO images VALUES ('idle', $1, $2, 'raw')", idle.as_uri(), hashlib.sha256(IDLE).hexdigest()
            )
        )
        yield installation


@pytest.fixture
async def client(house: Installation) -> AsyncIterator[Leveret]:
    async with house.client() as client:
        yield client


class Shell:
    """Somebody at a terminal."""

    def __init__(self, house: Installation, home: Path) -> None:
        self._env = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "XDG_CONFIG_HOME": str(home / "config"),
        }
        settings = config.Config(house.url, house.token, house.layout.root, house.layout.ssh_key)
        config.save(settings, config.config_path(self._env))

    async def run(self, *arguments: str, status: int = 0, stdin: str = "") -> str:
        """What a command prints; fails unless it ends with this status."""
        done = await asyncio.to_thread(
            subprocess.run,
            [LEVERET, *arguments],
            env=self._env,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == status, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + (done.stderr if status else "")

    async def json(self, *arguments: str) -> Any:
        return json.loads(await self.run(*arguments, "-o", "json"))


@pytest.fixture
def shell(house: Installation, tmp_path: Path) -> Shell:
    return Shell(house, tmp_path)


def domains(house: Installation) -> set[UUID]:
    """What the hypervisor has, whatever anybody says."""
    uri = Libvirtd(house.layout.libvirt).uri
    return {UUID(line) for line in virsh(uri, "list", "--all", "--uuid").split()}


def files(house: Installation) -> list[str]:
    """What the pool holds of VMs: their directories and their DHCP entries."""
    pool = house.layout.pool
    directories = [path for path in pool.iterdir() if path.is_dir() and path.name not in {"images", "dhcp"}]
    entries = [path for path in pool.glob("dhcp/*/*") if path.is_file() and path.read_text().strip()]
    return [str(path.relative_to(pool)) for path in (*directories, *entries)]


def small() -> CreateVm:
    return CreateVm(vcpus=1, memory_mib=64, disk_gib=1, image=ImageByName(name="idle"))


async def until_all(house: Installation, ids: list[UUID], state: State, *, within_s: float = 60) -> None:
    """Wait until every one of these VMs is in this state."""

    async def there() -> bool:
        rows = await house.query("SELECT id FROM vms WHERE id = ANY($1) AND state = $2", ids, state)
        return len(rows) == len(ids)

    await eventually(there, within_s=within_s, what=f"all {len(ids)} VMs {state}")


async def until_nothing_is_left(house: Installation, ids: list[UUID]) -> None:
    await until_all(house, ids, State.DELETED)
    assert domains(house) == set()
    assert files(house) == []
    await house.settle()


async def test_a_vm_lives_its_whole_life(house: Installation, shell: Shell, tmp_path: Path) -> None:
    script = tmp_path / "user-data"
    script.write_text("#!/bin/sh\necho user-data says hello from $(hostname)\n")
    arguments = ("--image", "appliance", "--memory", "128M", "--disk", "1G", "--user-data", str(script))
    await shell.run("create", "web", *arguments, "--wait", "ready", "--timeout", "90")

    vm = VmView.model_validate(await shell.json("show", "web"))
    assert (vm.state, vm.guest_ready) == (State.RUNNING, True)
    console = await shell.run("console-log", "web")
    assert f"hostname=web address={vm.address}/" in console
    assert f"instance-id={vm.id}" in console
    assert "user-data says hello from web" in console
    assert "Linux web" in await shell.run("ssh", "web", "--", "uname", "-a")
    assert domains(house) == {vm.id}

    await shell.run("ssh", "web", "--", "echo kept > /data/note && sync")
    await shell.run("stop", "web", "--wait")
    assert (await shell.json("show", "web"))["state"] == "stopped"
    await shell.run("start", "web", "--wait")
    await _answers(shell, "cat /data/note", "kept")
    boots = await shell.run("console-log", "web")
    await shell.run("reboot", "web")

    async def booted_again() -> bool:
        return (await shell.run("console-log", "web")).count("LEVERET-GUEST-READY") > boots.count("LEVERET-GUEST-READY")

    await eventually(booted_again, within_s=60, what="a guest that was reset")
    await _answers(shell, "cat /data/note", "kept")

    timeline = await shell.run("timeline", "web")
    for step in ("accepted", "scheduled", "image", "disk", "config drive", "define", "start", "running", "guest ready"):
        assert step in timeline

    await shell.run("delete", "web", "--wait")
    assert domains(house) == set()
    assert files(house) == []
    network = virsh(Libvirtd(house.layout.libvirt).uri, "net-dumpxml", "leveret-default")
    assert vm.mac is not None
    assert vm.mac not in network
    await house.settle()
    used = await house.query("SELECT vcpus_used + memory_mib_used + disk_gib_used AS used FROM hosts")
    assert [row["used"] for row in used] == [0]
    await shell.run("show", "web", status=3)


async def _answers(shell: Shell, command: str, expected: str) -> None:
    """A guest that has just been started takes a moment until it lets anybody in."""

    async def there() -> bool:
        try:
            return expected in await shell.run("ssh", "web", "--", command)
        except AssertionError:
            return False

    await eventually(there, within_s=60, what=f"{command} over ssh")


@pytest.mark.parametrize("victim", ["nobody", "api", "conductor-1", "compute"])
async def test_ten_vms_asked_for_at_once_all_run_whoever_dies(
    victim: str, house: Installation, client: Leveret
) -> None:
    ids = [new_id() for _ in range(10)]
    # The same create, three times each.
    creating = asyncio.gather(*(client.create(small(), vm_id=vm_id) for vm_id in ids * 3))
    if victim != "nobody":
        await eventually(lambda: asyncio.to_thread(domains, house), what="some domain")
        await asyncio.to_thread(house.kill, victim)
        await asyncio.to_thread(house.restart, victim)
    await creating
    await until_all(house, ids, State.RUNNING)
    assert domains(house) == set(ids)
    await house.settle()
    await asyncio.gather(*(client.delete(vm_id) for vm_id in ids))

    async def all_gone() -> bool:
        return all([(await client.get(vm_id)).state is State.DELETED for vm_id in ids])

    await eventually(all_gone, within_s=90, what="ten deleted VMs")
    assert domains(house) == set()
    assert files(house) == []
    await house.settle()


async def test_a_vm_deleted_at_any_point_of_its_build_leaves_nothing(house: Installation, client: Leveret) -> None:
    ids = [new_id() for _ in range(4)]
    for vm_id, pause_s in zip(ids, (0.0, 0.05, 0.15, 0.4), strict=True):
        await client.create(small(), vm_id=vm_id)
        await asyncio.sleep(pause_s)  # the point in the build, not a wait for anything
        await client.delete(vm_id)
    await until_nothing_is_left(house, ids)


async def test_what_does_not_fit_is_refused_with_numbers(shell: Shell) -> None:
    said = await shell.run("create", "big", "--image", "appliance", "--memory", "2T", "--no-wait", status=5)
    assert "no_capacity" in said
    assert "memory_mib" in said
    assert await shell.json("list") == []


async def test_an_image_that_is_not_what_was_said_fails_at_once(house: Installation, client: Leveret) -> None:
    cached = next(house.layout.image_dir(house.options).glob("appliance-*.qcow2"))
    for url, code in (
        (cached.as_uri(), Code.IMAGE_HASH_MISMATCH),
        (cached.with_name("missing.qcow2").as_uri(), Code.IMAGE_UNREACHABLE),
        ("file:///etc/hostname", Code.IMAGE_FORBIDDEN),
        ("http://127.0.0.1:1/x.qcow2", Code.IMAGE_FORBIDDEN),
    ):
        spec = small().model_copy(update={"image": ImageByUrl(url=url, sha256="0" * 64)})
        receipt = await client.create(spec)

        async def failed(vm_id: UUID = receipt.vm_id) -> Any:
            vm = await client.get(vm_id)
            return vm if vm.state is State.ERROR else None

        vm: VmView = await eventually(failed, within_s=30, what=f"{url} refused")
        assert vm.problem is not None
        codes = [vm.problem.code, *(attempt["code"] for attempt in vm.problem.details.get("attempts", []))]
        assert code in codes, vm.problem
        assert vm.problem.hint
        await client.delete(vm.id)
    assert files(house) == []
    cache = house.layout.pool / "images"
    assert not [path for path in cache.iterdir() if path.name.startswith("0" * 16)]
