"""Several processes of a kind: what script/chaos runs, so that killing one does not silence all."""

from pathlib import Path

import pytest

from leveret.stack.composition import Peers, Ports, compose
from leveret.stack.layout import Layout, Options
from leveret.stack.services import Runner, Service

pytestmark = pytest.mark.unit

PEERS = Peers(
    amqp_urls={f"leveret-{name}": f"amqp://leveret-{name}:secret@h/v" for name in ("api", "conductor", "compute")},
    database_urls={"conductor": "postgresql://conductor@h/d", "api": "postgresql://api@h/d"},
)


def composed(root: Path, options: Options) -> dict[str, Service]:
    layout = Layout(root)
    layout.make()
    composition = compose(layout, options, PEERS, Ports({}, Runner(layout.services)))
    assert composition.expected_hosts == options.fake_hosts
    assert composition.services[options.conductors].check.url == f"{composition.url}/readyz"
    return {service.name: service for service in composition.services}


def test_every_api_listens_on_a_port_of_its_own(tmp_path: Path) -> None:
    services = composed(tmp_path, Options(apis=3, libvirt=False))
    apis = [service for name, service in services.items() if name.startswith("api")]
    assert [service.name for service in apis] == ["api", "api-2", "api-3"]
    assert len({service.env["LEVERET_LISTEN_PORT"] for service in apis}) == 3


@pytest.mark.parametrize(("hosts", "workers", "shares"), [(7, 3, [3, 2, 2]), (2, 3, [1, 1]), (4, 1, [4])])
def test_simulated_hosts_are_spread_over_workers_of_which_each_is_another_host(
    tmp_path: Path, hosts: int, workers: int, shares: list[int]
) -> None:
    services = composed(tmp_path, Options(fake_hosts=hosts, fake_workers=workers, libvirt=False))
    fakes = [service for name, service in services.items() if name.startswith("fake-hosts")]
    assert [int(service.argv[-1]) for service in fakes] == shares
    for setting in ("LEVERET_HOST_STATE_DIR", "LEVERET_HOST_NAME"):
        assert len({service.env.get(setting) for service in fakes}) == len(fakes)
    # All below the one that `leveret down --purge` deletes.
    fake_hosts = Layout(tmp_path).fake_hosts
    assert all(Path(service.env["LEVERET_HOST_STATE_DIR"]).is_relative_to(fake_hosts) for service in fakes)
