"""Where one whole installation keeps what, and what it remembers from one `up` to the next."""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from leveret.stack.directory import default_state_dir
from leveret.stack.errors import StackError


@dataclass(frozen=True, slots=True)
class Options:
    """What runs. `api_port` 0 chooses one; `image_dir` None is where script/guest-images builds.

    Fake hosts are spread over `fake_zones` zones and `fake_workers` processes. `apis` beyond the first listen on ports
    of their own.
    """

    conductors: int = 1
    apis: int = 1
    fake_hosts: int = 0
    fake_zones: int = 1
    fake_workers: int = 1
    libvirt: bool = True
    virt_type: str = "auto"
    api_port: int = 0
    image_dir: str | None = None

    def changed(
        self,
        *,
        conductors: int | None = None,
        fake_hosts: int | None = None,
        fake_zones: int | None = None,
        libvirt: bool | None = None,
        virt_type: str | None = None,
        api_port: int | None = None,
        image_dir: str | None = None,
    ) -> "Options":
        """These with what was given this time; what was not given stays.

        Fake hosts take the place of the real one unless both are asked for: a VM that lands on a fake host is fake.
        """
        if libvirt is None and fake_hosts is not None:
            libvirt = fake_hosts == 0
        given = {
            "conductors": conductors,
            "fake_hosts": fake_hosts,
            "fake_zones": fake_zones,
            "libvirt": libvirt,
            "virt_type": virt_type,
            "api_port": api_port,
            "image_dir": image_dir,
        }
        return replace(self, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


class Layout:
    """The paths under a state directory."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or default_state_dir()).absolute()
        self.rabbitmq = self.root / "rabbitmq"
        self.postgres = self.root / "postgres"
        self.libvirt = self.root / "libvirt"
        self.services = self.root / "services"
        self.host = self.root / "host"
        self.fake_hosts = self.root / "fake-hosts"
        self.pool = self.root / "pool"
        self.ssh_key = self.root / "ssh" / "id_ed25519"
        self.token = self.root / "token"
        self.client_config = self.root / "client.toml"
        self.remembered = self.root / "stack.json"
        self.stopping = self.root / "stopping"
        self.resume = self.root / "resume.json"
        self.lock = self.root / "lock"

    def exists(self) -> bool:
        return self.remembered.exists()

    def make(self) -> None:
        """Make the directories. Servers of other accounts live below the root: all may pass, only we may look."""
        try:
            if not self.root.exists():  # what somebody else made keeps its mode
                self.root.mkdir(parents=True)
                self.root.chmod(0o711 if os.geteuid() == 0 else 0o700)
            for directory in (self.services, self.host, self.ssh_key.parent):
                directory.mkdir(exist_ok=True, mode=0o700)
        except PermissionError as error:
            raise StackError(
                f"cannot make {self.root}: {error.strerror}. Choose another one with --state-dir, or become root."
            ) from error

    def options(self) -> Options:
        """What the last `up` ran, or the defaults. What another version remembered is left out."""
        kept = self._read().get("options", {})
        known = asdict(Options())
        return Options(**{name: value for name, value in kept.items() if name in known})

    def ports(self) -> dict[str, int]:
        """The ports that services had."""
        ports: dict[str, int] = self._read().get("ports", {})
        return ports

    def remember(self, options: Options, ports: dict[str, int]) -> None:
        document = {"options": asdict(options), "ports": ports}
        write_private(self.remembered, json.dumps(document, indent=1) + "\n")

    def _read(self) -> dict[str, Any]:
        try:
            document: dict[str, Any] = json.loads(self.remembered.read_text())
        except FileNotFoundError:
            return {}
        return document

    def image_dir(self, options: Options) -> Path:
        if options.image_dir:
            return Path(options.image_dir)
        if os.environ.get("LEVERET_IMAGE_DIR"):
            return Path(os.environ["LEVERET_IMAGE_DIR"])
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(cache) / "leveret" / "images"


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    pending = path.with_name(f".{path.name}.new")
    pending.unlink(missing_ok=True)
    with os.fdopen(os.open(pending, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    pending.replace(path)
