"""A second Postgres that follows the first, and can take over from it."""

import signal
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from leveret.stack.account import Account
from leveret.stack.ports import free_port
from leveret.stack.postgres import SUPERUSER, Postgres, literal, programs
from leveret.stack.process import BASE_ENV


def standby_of(primary: Postgres, directory: Path) -> Postgres:
    """A streaming standby, running; from now on the primary waits for it with every COMMIT."""
    account = Account.for_service("postgres")
    standby = Postgres(directory, durable=primary.durable)
    with standby.directory.locked():
        standby.directory.give(account, "socket", "data")
    standby.directory.write({"port": free_port(), "roles": primary.directory.read()["roles"]})
    dsn = f"{primary.dsn(SUPERUSER)}?application_name={directory.name}"
    argv = [str(programs() / "pg_basebackup"), f"--dbname={dsn}", f"--pgdata={directory / 'data'}"]
    done = account.run([*argv, "--write-recovery-conf", "--checkpoint=fast"], env=dict(BASE_ENV), timeout_s=60)
    assert done.returncode == 0, done.stderr
    standby.start()
    standby.wait_ready()
    follow(primary, standby)
    return standby


def follow(primary: Postgres, standby: Postgres) -> None:
    """Have every COMMIT of the primary wait until the standby has it."""
    name = standby.directory.path.name
    primary.psql(f"ALTER SYSTEM SET synchronous_standby_names = {literal(name)}; SELECT pg_reload_conf();")
    primary.psql("SELECT txid_current();")  # returns once the standby confirms


def promote(standby: Postgres) -> None:
    """Make it the primary; nobody follows it."""
    standby.psql("ALTER SYSTEM SET synchronous_standby_names = ''; SELECT pg_promote();")


def unfence(former: Postgres) -> None:
    """What nobody should do: have a primary that was replaced run again by itself, taking writes."""
    with (former.directory.path / "data" / "postgresql.auto.conf").open("a") as settings:
        settings.write("synchronous_standby_names = ''\n")
    former.start()
    former.wait_ready()


def freeze(server: Postgres) -> list[psutil.Process]:
    """Stop every process of it, as on a machine that hangs. Connections stay, and nobody answers."""
    assert server.pid is not None
    postmaster = psutil.Process(server.pid)
    family = [postmaster, *postmaster.children(recursive=True)]
    for process in family:
        process.send_signal(signal.SIGSTOP)
    return family


def url_of(dsn: str, *servers: Postgres) -> str:
    """The same role and database, at whichever of these servers is the primary."""
    there = urlsplit(dsn)
    user = there.netloc.rpartition("@")[0]
    return there._replace(netloc=f"{user}@{','.join(f'127.0.0.1:{server.port}' for server in servers)}").geturl()
