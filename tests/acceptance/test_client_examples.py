"""Every example of docs/client.md, run as it stands against a whole installation."""

import ast
import asyncio
import inspect
import re
import uuid
from pathlib import Path
from typing import Any

import pytest
from installation import Installation

pytestmark = pytest.mark.acceptance

PAGE = Path(__file__).parents[2] / "docs" / "client.md"
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def examples() -> list[tuple[int, str]]:
    """Each block with the line of the page it begins after."""
    text = PAGE.read_text()
    return [(text[: block.start()].count("\n") + 1, block[1]) for block in _BLOCK.finditer(text)]


async def run(line: int, code: str, names: dict[str, Any]) -> None:
    """As `python -m asyncio` would; a failure points to the line of the page."""
    placed = "\n" * line + code
    compiled = compile(placed, str(PAGE), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    answer = eval(compiled, names)
    if inspect.iscoroutine(answer):
        await answer


async def test_every_example_of_the_guide_runs(house: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    user = f"builder-{uuid.uuid4().hex[:8]}"
    # As `leveret project add-amqp-user` does: first Leveret knows the user, then the broker.
    async with house.client() as client:
        await client.add_amqp_user("default", user)
    amqp_url = await asyncio.to_thread(house.rabbit.create_client, user, "default", "member")
    # Where script/guest-images has run, `leveret up` has registered it; simulated hosts boot anything.
    await house.query(
        """INSERT INTO images SELECT 'appliance', url, sha256, format FROM images WHERE name = 'tiny'
        ON CONFLICT DO NOTHING"""
    )
    monkeypatch.setenv("LEVERET_URL", house.url)
    monkeypatch.setenv("LEVERET_TOKEN", house.token)
    monkeypatch.setenv("LEVERET_AMQP_URL", amqp_url)
    names: dict[str, Any] = {"asyncio": asyncio, "__name__": "__main__"}
    found = examples()
    assert len(found) > 10
    for line, code in found:
        await run(line, code, names)
    async with house.client() as client:
        assert [vm.name async for vm in client.list()] == []
        await client.remove_amqp_user("default", user)


def test_the_images_of_the_guide_are_those_that_leveret_up_registers() -> None:
    """`leveret up` registers what script/guest-images builds, from the folders in deploy/images."""
    built = {folder.name for folder in (PAGE.parents[1] / "deploy" / "images").iterdir() if folder.is_dir()}
    named = set(re.findall(r'ImageByName\(name="([^"]+)"\)', PAGE.read_text()))
    assert named
    assert named <= built
