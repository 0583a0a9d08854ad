"""Broker and database away, hung, restarted; the process told to stop."""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from api_process import Api, running_api
from api_world import TINY, Proxy, ScriptedConductor, Tenant, problem_of
from httpx2 import AsyncClient

from leveret.api.app import build
from leveret.api.settings import ApiSettings
from leveret.shared import topology
from leveret.shared.errors import Code
from leveret.shared.ids import new_id
from leveret.stack.postgres import Postgres
from leveret.stack.rabbitmq import Rabbit

pytestmark = pytest.mark.integration
