"""What a domain that libvirt shows is taken for."""

from dataclasses import replace

import pytest

from leveret.compute.driver import Journal, Power
from leveret.compute.libvirt_driver import seeing
from leveret.compute.libvirt_driver.journal import Attachment, Memory, to_xml
from leveret.compute.libvirt_driver.seeing import Off, Seen
from leveret.shared.documents import Endpoint
from leveret.shared.errors import Code
from leveret.shared.ids import new_id
from leveret.shared.lifecycle import Wanted

pytestmark = pytest.mark.unit

VM_ID = new_id()
JOURNAL = Journal(VM_ID, "demo", "web-1", 3, 5, Wanted.RUNNING, 0, "this boot")


def test_every_reason_that_libvirt_gives_is_explained() -> None:
    for off in Off:
        problem = seeing.why(off, JOURNAL, "this boot")
        assert problem is not None
        assert problem.code in {Code.GUEST_SHUTDOWN, Code.GUEST_CRASHED}


@pytest.mark.parametrize(
    ("off", "code"),
    [
        (Off.SHUTDOWN, Code.GUEST_SHUTDOWN),
        (Off.DESTROYED, Code.GUEST_SHUTDOWN),
        (Off.CRASHED, Code.GUEST_CRASHED),
        (Off.FAILED, Code.GUEST_CRASHED),
        (Off.DAEMON, Code.GUEST_CRASHED),
    ],
)
def test_a_guest_that_is_off_has_stopped_or_crashed(off: Off, code: Code) -> None:
    problem = seeing.why(off, JOURNAL, "this boot")

    assert problem is not None
    assert problem.code is code


@pytest.mark.parametrize("off", Off)
def test_one_that_should_be_off_needs_no_reason(off: Off) -> None:
    assert seeing.why(off, replace(JOURNAL, wanted=Wanted.STOPPED), "this boot") is None


@pytest.mark.parametrize("off", Off)
def test_after_a_reboot_of_the_host_that_is_the_reason(off: Off) -> None:
    problem = seeing.why(off, JOURNAL, "another boot")

    assert problem is not None
    assert problem.code is Code.HOST_REBOOTED


def test_one_that_was_never_started_needs_no_reason() -> None:
    made = replace(JOURNAL, generation=0)

    assert seeing.why(Off.UNKNOWN, made, "this boot") is None
    assert seeing.why(Off.UNKNOWN, made, "another boot") is None


def test_one_that_crashed_before_its_first_mark_has_crashed() -> None:
    problem = seeing.why(Off.CRASHED, replace(JOURNAL, generation=0), "this boot")

    assert problem is not None
    assert problem.code is Code.GUEST_CRASHED


def test_only_what_carries_its_own_journal_is_ours() -> None:
    ours = Seen(VM_ID, to_xml(Memory(JOURNAL)), Power.RUNNING)
    copied = replace(ours, vm_id=new_id())
    bare = replace(ours, metadata=None)
    broken = replace(ours, metadata="<vm/>")

    inventory = seeing.inventory_of([ours, copied, bare, broken], boot_id="this boot", advertise_host="h")

    assert [domain.journal.vm_id for domain in inventory.domains] == [VM_ID]
    assert inventory.foreign == 3


def test_ssh_is_reached_at_the_guest_behind_nat_and_at_the_host_in_user_mode() -> None:
    nat = Attachment("nat", "default", "0a:00:00:00:00:01", "10.80.0.7")

    assert seeing.endpoint(nat, "host.example") == Endpoint(host="10.80.0.7", port=22)
    assert seeing.endpoint(replace(nat, mode="user", port=20022), "host.example") == Endpoint(
        host="host.example", port=20022
    )
    assert seeing.endpoint(None, "host.example") is None
