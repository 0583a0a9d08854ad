"""Worlds that several files of tests live in."""

from collections.abc import AsyncIterator

import pytest
from conductor_world import World, world_of

from leveret.stack.rabbitmq import Rabbit


@pytest.fixture
async def world(broker: Rabbit, database: str) -> AsyncIterator[World]:
    async with world_of(broker, database) as world:
        yield world
