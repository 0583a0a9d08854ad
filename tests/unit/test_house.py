"""The house rules that a machine can check."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from leveret.conductor import migrate
from leveret.shared import lifecycle, messages
from leveret.shared.errors import HINTS, Code

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]


def test_the_namespace_has_no_init_file() -> None:
    strays = [path for path in ROOT.glob("**/leveret/__init__.py") if ".venv" not in path.parts]
    assert strays == []


def test_every_code_has_a_hint() -> None:
    assert set(HINTS) == set(Code)


def test_the_table_of_moves_is_the_same_in_sql() -> None:
    sql = next(one.sql for one in reversed(migrate.shipped()) if "FUNCTION vm_move_is_legal" in one.sql)
    function = sql[sql.index("FUNCTION vm_move_is_legal") : sql.index("$$;", sql.index("FUNCTION vm_move_is_legal"))]
    in_sql = {
        old: frozenset(re.findall(r"'(\w+)'", new))
        for old, new in re.findall(r"WHEN '(\w+)' THEN new IN \(([^)]*)\)", function)
    }
    in_code = {str(old): frozenset(map(str, new)) for old, new in lifecycle.MOVES.items() if new}
    assert in_sql == in_code


def test_every_message_model_is_in_the_registry() -> None:
    assert len(messages.TYPE_OF) == len(messages.REGISTRY)
    models = {
        value
        for value in vars(messages).values()
        if isinstance(value, type) and issubclass(value, messages.Message) and value is not messages.Message
    }
    parts = {
        messages.Image,
        messages.Nic,
        messages.Capacity,
        messages.SeenDomain,
        messages.VmReport,
        messages.MadeVm,
    }
    assert models - parts <= set(messages.REGISTRY.values())


def test_the_command_line_imports_no_server(tmp_path: Path) -> None:
    code = (
        "import sys, leveret.client.cli\n"
        "heavy = {'fastapi', 'aio_pika', 'asyncpg', 'libvirt', 'httpx2', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
