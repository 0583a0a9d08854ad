"""A private PostgreSQL on loopback, under a directory."""

import os
import re
import secrets
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import psutil

from leveret.stack.account import Account
from leveret.stack.directory import ServerDirectory
from leveret.stack.errors import ProcessExitedError, StackError
from leveret.stack.ports import free_port, is_free
from leveret.stack.process import BASE_ENV, Daemon

PROGRAMS = Path("/usr/lib/postgresql")
OLDEST_VERSION = 15
SUPERUSER = "postgres"

START_ATTEMPTS = 3
INITDB_TIMEOUT_S = 60.0
PSQL_TIMEOUT_S = 60.0
DRAIN_S = 30.0
SOCKET_PATH_MAX = 107  # bytes in sockaddr_un.sun_path, less the final zero
PORT_TAKEN = re.compile(r"address already in use", re.IGNORECASE)
STATUS_LINE = 7  # of postmaster.pid: what `pg_ctl` itself waits for (PostgreSQL, src/include/utils/pidfile.h)

# How the postmaster takes an order to end: `fast` rolls sessions back and writes a checkpoint,
# `immediate` leaves the same state behind as a crash. `smart` would wait for every client to go.
StopMode = Literal["fast", "immediate"]
STOP_SIGNALS: Mapping[StopMode, signal.Signals] = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT}


class Postgres:
    """A PostgreSQL server of its own: cluster, port, socket, roles and log in one directory.

    It listens on 127.0.0.1 and on a Unix socket in its directory, and asks everybody for a password.
    `durable=False` turns off fsync, for tests: a killed server still loses nothing, a power cut may.
    The port may change until `wait_ready` has returned for the first time, and later only if somebody
    else took it while the server was down.
    """

    def __init__(self, directory: Path, *, durable: bool = True) -> None:
        self.directory = ServerDirectory(directory, "postgres")
        self.durable = durable
        self._postmaster = Daemon("postgres", self.directory.path)

    @property
    def port(self) -> int:
        """Return the TCP port on 127.0.0.1."""
        return int(self.directory.read()["port"])

    @property
    def pid(self) -> int | None:
        """Return the postmaster's process id while it lives."""
        return self._postmaster.pid

    @property
    def log_file(self) -> Path:
        """Return the path of the server's log."""
        return self._postmaster.log_file

    def dsn(self, role: str = SUPERUSER, database: str = "postgres") -> str:
        """Return the connection URL of a role that was made here; raises StackError when it was not."""
        facts = self.directory.read()
        if role not in facts["roles"]:
            raise StackError(f"database role '{role}' was not made by this server")
        return f"postgresql://{role}:{facts['roles'][role]}@127.0.0.1:{facts['port']}/{database}"

    def is_running(self) -> bool:
        """Tell whether the postmaster is alive; `wait_ready` tells whether it takes connections."""
        return self._postmaster.is_running()

    def start(self) -> None:
        """Start the server, or do nothing when it runs; the first time a cluster is made (about 1 s).

        Returns before the server takes connections, see `wait_ready`. Raises StackError when PostgreSQL
        15 or newer is not installed or its account cannot reach the directory.
        """
        with self.directory.locked():
            if not self.is_running():
                self._start()

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return when the server takes connections, recovery included.

        Raises ProcessExitedError or NotReadyError with the tail of the log.
        """
        for attempt in range(START_ATTEMPTS):
            try:
                self._postmaster.wait_ready(self._takes_connections, timeout_s)
            except ProcessExitedError as error:
                if attempt + 1 == START_ATTEMPTS or not PORT_TAKEN.search(str(error)):
                    raise
                self.start()  # chooses another port, since this one is taken
            else:
                return

    def stop(self, mode: StopMode = "fast", drain_s: float = DRAIN_S) -> None:
        """Stop the server; the data stays. Sessions are ended, not waited for."""
        if self.directory.exists():
            with self.directory.locked():
                self._postmaster.stop(drain_s, STOP_SIGNALS[mode])

    def restart(self, mode: StopMode = "fast", timeout_s: float = 60.0) -> None:
        """Stop and start, and wait until it is ready; `immediate` makes it recover as from a crash."""
        self.stop(mode)
        self.start()
        self.wait_ready(timeout_s)

    def kill(self) -> None:
        """SIGKILL the postmaster and every backend."""
        if self.directory.exists():
            with self.directory.locked():
                self._postmaster.kill()

    def destroy(self) -> None:
        """Stop the server at once and delete its directory."""
        if self.directory.exists():
            self.kill()
            self.directory.remove()

    def psql(self, sql: str, *, database: str = "postgres", role: str = SUPERUSER) -> str:
        """Run SQL, each statement for itself, and return the rows: one a line, columns split by `|`.

        Stops at the first error and raises StackError with it.
        """
        password = self.directory.read()["roles"][role]
        argv = [
            str(programs() / "psql"),
            *("--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--set=ON_ERROR_STOP=1"),
            *("--host=127.0.0.1", f"--port={self.port}", f"--username={role}", f"--dbname={database}"),
            "--file=-",
        ]
        env = {**BASE_ENV, "PGPASSWORD": password, "PGCONNECT_TIMEOUT": "10"}
        answer = Account.for_service("postgres").run(argv, env=env, timeout_s=PSQL_TIMEOUT_S, stdin=sql)
        if answer.returncode != 0:
            raise StackError(f"psql failed: {answer.stderr.strip()}")
        return answer.stdout.rstrip("\n")

    def create_role(self, role: str, password: str | None = None) -> None:
        """Make a role that may log in, or give an existing one this password.

        Without a password it keeps the one it has, or gets a random one; `dsn(role)` knows it.
        """
        with self.directory.locked():
            facts = self.directory.read()
            password = password or facts["roles"].get(role) or secrets.token_urlsafe(24)
            self._create_missing(
                f"SELECT FROM pg_roles WHERE rolname = {literal(role)}", f"CREATE ROLE {identifier(role)}"
            )
            self.psql(f"ALTER ROLE {identifier(role)} LOGIN PASSWORD {literal(password)};")
            facts["roles"][role] = password
            self.directory.write(facts)

    def create_database(self, name: str, *, owner: str = SUPERUSER, template: str = "template0") -> None:
        """Make a database unless it exists. A copy of a `template` of ours costs tens of milliseconds."""
        self._create_missing(
            f"SELECT FROM pg_database WHERE datname = {literal(name)}",
            f"CREATE DATABASE {identifier(name)} OWNER {identifier(owner)}"
            f" TEMPLATE {identifier(template)} STRATEGY wal_log",
        )

    def drop_database(self, name: str) -> None:
        """Drop a database if it exists; its sessions are ended."""
        self.psql(f"DROP DATABASE IF EXISTS {identifier(name)} WITH (FORCE);")

    def _create_missing(self, found: str, statement: str) -> None:
        self.psql(f"SELECT {literal(statement)} WHERE NOT EXISTS ({found}) \\gexec")

    def _start(self) -> None:
        account = Account.for_service("postgres")
        self.directory.give(account, "socket")
        if not self.directory.exists():
            self.directory.write({"port": free_port(), "roles": {SUPERUSER: secrets.token_urlsafe(24)}})
        facts = self.directory.read()
        if not (self._data / "PG_VERSION").exists():
            self._make_cluster(account, facts["roles"][SUPERUSER])
        if not is_free(facts["port"]):
            facts["port"] = free_port(taken=[facts["port"]])
            self.directory.write(facts)
        self._clear_locks_of_zombie()
        config = self._write_config(facts, account)
        program = self._programs_of_data() / "postgres"
        self._postmaster.start([str(program), "-D", str(self._data), "-c", f"config_file={config}"], account=account)

    def _make_cluster(self, account: Account, password: str) -> None:
        """Run initdb in a draft directory: a cluster half made is never taken for a whole one."""
        draft = self._data.with_name("draft")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(mode=0o700)
        os.chown(draft, account.uid, account.gid)
        pwfile = self.directory.share("initdb-password", password, account)
        argv = [
            str(programs() / "initdb"),
            *(f"--pgdata={draft}", f"--username={SUPERUSER}", f"--pwfile={pwfile}", "--auth=scram-sha-256"),
            *("--encoding=UTF8", "--locale=C.UTF-8", "--no-instructions"),
            *([] if self.durable else ["--no-sync"]),
        ]
        try:
            answer = account.run(argv, env=dict(BASE_ENV), timeout_s=INITDB_TIMEOUT_S)
        finally:
            pwfile.unlink()
        if answer.returncode != 0:
            raise StackError(f"initdb failed:\n{answer.stderr.strip()}")
        draft.replace(self._data)

    def _write_config(self, facts: Mapping[str, Any], account: Account) -> Path:
        socket_dir = self.directory.path / "socket"
        longest = socket_dir / f".s.PGSQL.{facts['port']}"
        settings = {
            "data_directory": str(self._data),
            "hba_file": str(self._data / "pg_hba.conf"),
            "ident_file": str(self._data / "pg_ident.conf"),
            "listen_addresses": "127.0.0.1",
            "port": str(facts["port"]),
            "unix_socket_directories": str(socket_dir) if len(str(longest)) <= SOCKET_PATH_MAX else "",
            "max_connections": "200",
            "shared_buffers": "128MB",
            "fsync": "on" if self.durable else "off",
            "full_page_writes": "on" if self.durable else "off",
            "jit": "off",
            "timezone": "UTC",
            "log_timezone": "UTC",
            "log_line_prefix": "%m [%p] %q%u@%d ",
        }
        lines = [f"{key} = {literal(value)}\n" for key, value in settings.items()]
        return self.directory.share("postgresql.conf", "".join(lines), account)

    def _programs_of_data(self) -> Path:
        """Return the programs of the version that made the cluster, which alone can read it."""
        version = (self._data / "PG_VERSION").read_text().strip()
        found = PROGRAMS / version / "bin"
        if not (found / "postgres").exists():
            raise StackError(f"{self._data} needs PostgreSQL {version}, which is not installed")
        return found

    def _clear_locks_of_zombie(self) -> None:
        """Remove the locks of a killed server that process 1 has not collected yet.

        PostgreSQL takes the zombie for a live server and refuses to start. What really still uses the
        cluster, it recognises by its shared memory as well.
        """
        for lock in [self._data / "postmaster.pid", *(self.directory.path / "socket").glob(".s.PGSQL.*.lock")]:
            try:
                holder = psutil.Process(int(lock.read_text().splitlines()[0]))
                if holder.status() == psutil.STATUS_ZOMBIE:
                    lock.unlink()
            except (FileNotFoundError, psutil.NoSuchProcess):
                continue

    def _takes_connections(self) -> bool:
        """Read what `pg_ctl` reads: the postmaster notes there when it is ready."""
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        ready = len(lines) > STATUS_LINE and lines[STATUS_LINE].strip() == "ready"
        return ready and int(lines[0]) == self.pid

    @property
    def _data(self) -> Path:
        return self.directory.path / "data"


def programs() -> Path:
    """Return the directory of the newest PostgreSQL programs; raises StackError when they are too old."""
    versions = [int(path.parent.parent.name) for path in PROGRAMS.glob("[0-9]*/bin/postgres")]
    newest = max(versions, default=0)
    if newest < OLDEST_VERSION:
        found = f"the newest here is {newest}" if newest else f"there is none in {PROGRAMS}"
        raise StackError(f"PostgreSQL {OLDEST_VERSION} or newer is needed; {found}: try script/setup")
    return PROGRAMS / str(newest) / "bin"


def identifier(name: str) -> str:
    """Quote a name for SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """Quote a string for SQL, or for a configuration file of PostgreSQL."""
    return "'" + text.replace("'", "''") + "'"
