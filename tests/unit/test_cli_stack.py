"""What `leveret up` decides before it starts anything."""

import os
import stat
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from leveret.stack.addressing import CANDIDATES, choose_network, resolvers, routed_networks
from leveret.stack.bootstrap import images_in, token_in
from leveret.stack.composition import Peers, Ports, compose
from leveret.stack.errors import StackError
from leveret.stack.layout import Layout, Options
from leveret.stack.services import Runner

pytestmark = pytest.mark.unit

ROUTES = """\
Iface	Destination	Gateway 	Flags	RefCnt	Use	Metric	Mask		MTU	Window	IRTT
eth0	00000000	010011AC	0003	0	0	0	00000000	0	0	0
eth0	000011AC	00000000	0001	0	0	0	0000FFFF	0	0	0
br0	0000500A	00000000	0001	0	0	0	00F0FFFF	0	0	0
"""


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path / "state")
    made.make()
    return made


def test_the_kernels_table_is_read_without_its_default_route() -> None:
    assert routed_networks(ROUTES) == [IPv4Network("172.17.0.0/16"), IPv4Network("10.80.0.0/20")]


def test_a_network_that_is_routed_already_is_not_chosen() -> None:
    assert choose_network([]) == IPv4Network("10.80.0.0/20")
    assert choose_network(routed_networks(ROUTES)) == IPv4Network("10.81.0.0/20")


def test_a_wide_route_rules_out_all_within_it() -> None:
    assert choose_network([IPv4Network("10.0.0.0/8")]) == IPv4Network("172.29.0.0/20")


def test_when_everything_is_routed_the_error_says_so() -> None:
    with pytest.raises(StackError, match="routed"):
        choose_network(list(CANDIDATES))


def test_guests_get_no_resolver_on_loopback() -> None:
    text = "# resolv.conf\nnameserver 127.0.0.53\nnameserver 192.0.2.1\nnameserver fe80::1\nsearch x\nnameserver\n"
    assert resolvers(text) == ["192.0.2.1"]


def test_fake_hosts_take_the_place_of_the_real_one_unless_both_are_asked_for() -> None:
    assert Options().changed(fake_hosts=5).libvirt is False
    assert Options().changed(fake_hosts=5, libvirt=True).libvirt is True
    assert Options(fake_hosts=5, libvirt=False).changed(fake_hosts=0).libvirt is True


def test_what_is_not_given_stays_as_it_was() -> None:
    before = Options(conductors=3, fake_hosts=5, libvirt=False, api_port=9000)
    assert before.changed() == before
    assert before.changed(conductors=1) == Options(conductors=1, fake_hosts=5, libvirt=False, api_port=9000)


def test_what_is_remembered_comes_back_and_is_private(layout: Layout) -> None:
    options = Options(conductors=2, fake_hosts=7, libvirt=False)
    layout.remember(options, {"api": 8420})
    assert layout.options() == options
    assert layout.ports() == {"api": 8420}
    assert stat.S_IMODE(layout.remembered.stat().st_mode) == 0o600


def test_options_of_another_version_do_not_stop_this_one(layout: Layout) -> None:
    layout.remembered.write_text('{"options": {"conductors": 2, "of_the_future": true}}')
    assert layout.options() == Options(conductors=2)


def test_a_directory_of_somebody_elses_making_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    Layout(tmp_path).make()
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    Layout(tmp_path / "new").make()
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) & 0o066 == 0


def test_a_directory_that_cannot_be_made_is_told_with_a_way_out(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(StackError, match="--state-dir"):
        Layout(tmp_path / "state").make()


def test_the_token_is_made_once_and_for_its_owner_alone(layout: Layout) -> None:
    token = token_in(layout)
    assert token.startswith("lv_")
    assert len(token) >= 3 + 43  # 256 bits in base64
    assert token_in(layout) == token
    assert stat.S_IMODE(layout.token.stat().st_mode) == 0o600


def test_the_newest_image_of_each_name_is_registered(tmp_path: Path) -> None:
    for age_s, file in enumerate(
        ["appliance-bbb.qcow2", "appliance-aaa.qcow2", "debian-ccc.qcow2", "unhashed-ddd.qcow2"]
    ):
        (tmp_path / file).touch()
        os.utime(tmp_path / file, (1000 - age_s, 1000 - age_s))
        if not file.startswith("unhashed"):
            (tmp_path / f"{file}.sha256").write_text(f"{'0' * 63}{age_s}\n")
    found = {image.name: image for image in images_in(tmp_path)}
    assert found.keys() == {"appliance", "debian"}
    assert found["appliance"].url == (tmp_path / "appliance-bbb.qcow2").as_uri()


def test_a_directory_without_images_offers_none(tmp_path: Path) -> None:
    assert images_in(tmp_path / "nowhere") == []


PEERS = Peers(
    amqp_urls={f"leveret-{name}": f"amqp://leveret-{name}:secret@h/v" for name in ("api", "conductor", "compute")},
    database_urls={"conductor": "postgresql://conductor@h/d", "api": "postgresql://api@h/d"},
)


def test_every_service_speaks_to_the_broker_as_itself(layout: Layout) -> None:
    runner = Runner(layout.services)
    options = Options(conductors=2, fake_hosts=3, libvirt=False)
    composition = compose(layout, options, PEERS, Ports({}, runner))
    users = {
        service.name: service.env["LEVERET_AMQP_URL"].split("//")[1].split(":")[0] for service in composition.services
    }
    assert users == {
        "conductor-1": "leveret-conductor",
        "conductor-2": "leveret-conductor",
        "api": "leveret-api",
        "fake-hosts": "leveret-compute",
    }
    assert composition.expected_hosts == 3


def test_ports_are_kept_and_never_given_twice(layout: Layout) -> None:
    runner = Runner(layout.services)
    first = Ports({}, runner)
    options = Options(conductors=3, libvirt=False)
    compose(layout, options, PEERS, first)
    assert len(set(first.chosen.values())) == 4
    second = Ports(first.chosen, runner)
    compose(layout, options, PEERS, second)
    assert second.chosen == first.chosen


def test_a_service_is_another_one_when_its_settings_are_and_its_record_holds_no_password(layout: Layout) -> None:
    runner = Runner(layout.services)
    one = compose(layout, Options(libvirt=False), PEERS, Ports({}, runner)).services[0]
    moved = Peers({**PEERS.amqp_urls, "leveret-conductor": "amqp://leveret-conductor:other@h/v"}, PEERS.database_urls)
    two = compose(layout, Options(libvirt=False), moved, Ports({}, runner)).services[0]
    assert one.name == two.name
    assert one.fingerprint != two.fingerprint
    assert "secret" not in one.fingerprint
