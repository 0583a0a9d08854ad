"""User-data, tokens and passwords stay where they belong: no log, no event, no answer and no open file has them."""

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx2
import psutil
import pytest
from installation import Installation
from peers import tiny

from leveret.client import Leveret
from leveret.client.amqp import LeveretAmqp
from leveret.client.errors import ClientError
from leveret.shared.documents import CreateToken, UpdateQuota
from leveret.shared.ids import new_id
from leveret.stack.up import BROKER_USERS, DATABASE, DATABASE_ROLES

pytestmark = pytest.mark.acceptance

USER_DATA = "#cloud-config\npassword: brown-hare-of-the-north\n"
LARGEST_BYTES = 64 * 1024 * 1024


def password_in(url: str) -> str | None:
    found = urlsplit(url).password
    return unquote(found) if found else None


def strayed(secrets: Mapping[str, str], files: list[Path]) -> list[tuple[str, str]]:
    """Which secrets stand in which of these files."""
    found = []
    for file in files:
        if file.is_file() and file.stat().st_size <= LARGEST_BYTES:
            text = file.read_bytes()
            found += [(name, str(file)) for name, secret in secrets.items() if secret.encode() in text]
    return found


def is_open_to_all(file: Path, root: Path) -> bool:
    """Whether any account of the machine may read it."""
    above = [parent for parent in file.parents if parent.is_relative_to(root)]
    return bool(file.stat().st_mode & 0o004) and all(parent.stat().st_mode & 0o001 for parent in above)


async def test_secrets_of_a_whole_run_are_in_no_log_no_event_and_no_open_file(
    house: Installation, tmp_path: Path
) -> None:
    amqp = house.rabbit.create_client("hush", "secretive")
    async with house.client() as admin:
        await admin.create_project("secretive", UpdateQuota(vms=10))
        await admin.add_amqp_user("secretive", "hush")
        token = (await admin.create_token("secretive", CreateToken(name="t", role="member"))).token
    secrets = {
        "user-data": "brown-hare-of-the-north",
        "user-data in base64": base64.b64encode(USER_DATA.encode()).decode().rstrip("=")[:-2],
        "the administrator's token": house.token,
        "a member's token": token,
        "the hash of a token": hashlib.sha256(token.encode()).hexdigest(),
        "a client's broker password": password_in(amqp) or "",
    }
    urls = {user: house.rabbit.url_of(user) for user in BROKER_USERS}
    urls |= {role: house.postgres.dsn(role, DATABASE) for role in DATABASE_ROLES}
    secrets |= {f"the password of {user}": password for user, url in urls.items() if (password := password_in(url))}
    assert all(secrets.values())
    answers = await _use(house, token, amqp)
    house.rabbit.delete_client("hush")

    root = house.layout.root
    logs = [file for file in root.rglob("*") if file.is_file() and ".log" in file.name]
    assert {"api.log", "conductor-1.log", "conductor-2.log"} <= {file.name for file in logs}
    assert strayed(secrets, logs) == []
    open_files = [file for file in root.rglob("*") if file.is_file() and is_open_to_all(file, root)]
    assert strayed(secrets, open_files) == []
    answered = tmp_path / "answers"
    answered.write_text(answers)
    events = tmp_path / "events"
    events.write_text(json.dumps([str(dict(row)) for row in await house.query("SELECT * FROM events")]))
    rows = tmp_path / "rows"
    rows.write_text(json.dumps([str(dict(row)) for row in await house.query("SELECT * FROM vms")]))
    commands = tmp_path / "commands"
    pids = [house.runner.daemon(name).pid for name in house.services]
    commands.write_text("\n".join(" ".join(psutil.Process(pid).cmdline()) for pid in pids if pid))
    assert strayed(secrets, [answered, events, rows, commands]) == []
    # The search itself finds what is there.
    planted = tmp_path / "planted.log"
    planted.write_text("\n".join(secrets.values()))
    assert len(strayed(secrets, [planted])) == len(secrets)


async def _use(house: Installation, token: str, amqp: str) -> str:
    """Use every secret, rightly and wrongly, over REST and AMQP; what was answered."""
    said: list[str] = []
    async with Leveret(house.url, token) as member, LeveretAmqp(amqp, "secretive", waits=False) as client:
        good = tiny(None, user_data=USER_DATA)
        receipt = await member.create(good, wait="running", timeout_s=60)
        said.append(receipt.model_dump_json())
        vm_id = new_id()
        said.append((await client.create(good, vm_id=vm_id)).model_dump_json())
        taken = tiny(None, user_data=USER_DATA + "more")
        huge = good.model_copy(update={"vcpus": 1000})
        nowhere = tiny(None, user_data=USER_DATA, network="nowhere")
        for attempt in (member.create(taken, vm_id=vm_id), member.create(huge), client.create(nowhere)):
            with pytest.raises(ClientError) as refused:
                await attempt
            said.append(f"{refused.value} {vars(refused.value)}")
        raw = f'{{"user_data": {json.dumps(USER_DATA)}, "password": "brown-hare-of-the-north", "vcpus": "many"}}'
        async with httpx2.AsyncClient(base_url=house.url) as http:
            for bearer in (token, token[:-1] + "x"):
                answer = await http.put(
                    f"/v1/vms/{new_id()}",
                    content=raw,
                    headers={"Authorization": f"Bearer {bearer}", "Content-Type": "application/json"},
                )
                assert answer.status_code in {401, 422}
                said.append(answer.text)
        said += [event.model_dump_json() async for event in member.events()]
        for made in (receipt.vm_id, vm_id):
            await member.delete(made, wait=True)
    return "\n".join(said)
