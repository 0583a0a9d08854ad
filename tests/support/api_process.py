"""`leveret-api` as a process of its own, for tests."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

from leveret.stack.ports import free_port


@dataclass(frozen=True)
class Api:
    url: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def wait_ready(self, *, status: int = 200, within_s: float = 20.0) -> httpx2.Response:
        """The answer of /readyz once it has this status."""
        deadline = time.monotonic() + within_s
        while (answer := httpx2.get(f"{self.url}/readyz", timeout=10, trust_env=False)).status_code != status:
            assert time.monotonic() < deadline, answer.text
            time.sleep(0.05)
        return answer


@contextmanager
def running_api(directory: Path, **settings: object) -> Iterator[Api]:
    """The process, once it answers; stopped afterwards. Settings are given by their names in small letters."""
    port = free_port()
    program = shutil.which("leveret-api", path=str(Path(sys.executable).parent))
    assert program is not None
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LEVERET_")}
    environment |= {"LEVERET_LISTEN_PORT": str(port)}
    environment |= {f"LEVERET_{name.upper()}": str(value) for name, value in settings.items()}
    log = directory / f"api-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen([program], env=environment, stdout=output, stderr=subprocess.STDOUT)
    api = Api(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait_alive(api)
        yield api
    finally:
        process.terminate()
        process.wait(20)


def _wait_alive(api: Api) -> None:
    deadline = time.monotonic() + 20
    while True:
        assert api.process.poll() is None, api.log.read_text()
        try:
            httpx2.get(f"{api.url}/livez", timeout=2, trust_env=False)
        except httpx2.TransportError:
            assert time.monotonic() < deadline, api.log.read_text()
            time.sleep(0.05)
        else:
            return
