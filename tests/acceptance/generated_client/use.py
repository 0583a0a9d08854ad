"""Make, read, rename and delete a VM with nothing but what was generated from /openapi.json."""

# mypy: disable-error-code="import-not-found"

import sys
from http import HTTPStatus
from uuid import uuid4

from generated import AuthenticatedClient
from generated.api.vms import create_vm, delete_vm, get_vm, update_vm
from generated.models import CreateVm, CreateVmLabels, CreateVmWaitType0, ImageByName, UpdateVm


def main(url: str, token: str) -> None:
    client = AuthenticatedClient(base_url=url, token=token)
    vm_id = uuid4()
    labels = CreateVmLabels.from_dict({"made-by": "generated"})
    wish = CreateVm(image=ImageByName(name="tiny"), vcpus=1, memory_mib=128, disk_gib=1, labels=labels)
    asked = create_vm.sync(vm_id, client=client, body=wish, wait=CreateVmWaitType0.RUNNING)
    print(asked.verdict)

    shown = get_vm.sync_detailed(vm_id, client=client)
    print(shown.parsed.state)
    assert shown.parsed.labels.to_dict() == {"made-by": "generated"}

    etag = shown.headers["ETag"]
    update_vm.sync(vm_id, client=client, body=UpdateVm(name="renamed"), if_match=etag)
    print(get_vm.sync(vm_id, client=client).name)

    stale = delete_vm.sync_detailed(vm_id, client=client, if_match=etag)
    assert stale.status_code == HTTPStatus.PRECONDITION_FAILED
    assert stale.parsed.code == "precondition_failed"
    print("stale")

    gone = delete_vm.sync(vm_id, client=client, wait="deleted")
    print(gone.vm.state)


main(*sys.argv[1:])
