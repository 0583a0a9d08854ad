"""What a fresh database needs before the first VM: a project, a network, images, and a token to ask with."""

import hashlib
import secrets
import uuid
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path

import asyncpg

from leveret.stack.addressing import choose_network, resolvers, routed_networks
from leveret.stack.errors import StackError
from leveret.stack.layout import Layout, write_private

DATABASE = "leveret"
OWNER = "leveret"
PROJECT = "default"
NETWORK = "default"
MADE_BY = "leveret up"


@dataclass(frozen=True, slots=True)
class Image:
    """A guest image on this machine."""

    name: str
    path: Path
    sha256: str

    @property
    def url(self) -> str:
        return self.path.as_uri()


@dataclass(frozen=True, slots=True)
class Furnished:
    """What is there now."""

    network: IPv4Network
    images: tuple[str, ...]


def images_in(directory: Path) -> list[Image]:
    """The images that script/guest-images built: NAME-RECIPE.qcow2 beside its .sha256; the newest of each name."""
    newest: dict[str, Image] = {}
    try:
        files = sorted(directory.glob("*.qcow2"), key=lambda file: file.stat().st_mtime)
    except OSError as error:
        raise StackError(f"cannot read the images in {directory}: {error}") from error
    for file in files:
        name, dash, _ = file.stem.rpartition("-")
        hashed = file.with_name(f"{file.name}.sha256")
        if dash and hashed.exists():
            newest[name] = Image(name, file.absolute(), hashed.read_text().split()[0])
    return list(newest.values())


def token_in(layout: Layout) -> str:
    """The administrator's token, made once: 256 random bits."""
    try:
        return layout.token.read_text().strip()
    except FileNotFoundError:
        token = f"lv_{secrets.token_urlsafe(32)}"
        write_private(layout.token, token + "\n")
        return token


async def furnish(dsn: str, token: str, images: list[Image]) -> Furnished:
    """Make what is missing, and point images at their newest files. Doing it again changes nothing."""
    connection = await asyncpg.connect(dsn)
    try:
        async with connection.transaction():
            # Two at once would both find nothing; the second waits here and finds everything.
            await connection.execute("SELECT pg_advisory_xact_lock(hashtext('leveret bootstrap'))")
            await connection.execute("INSERT INTO projects (id) VALUES ($1) ON CONFLICT DO NOTHING", PROJECT)
            if await connection.fetchval("SELECT deleted_at IS NOT NULL FROM projects WHERE id = $1", PROJECT):
                raise StackError(
                    f"project {PROJECT} was deleted, so nobody could use the token of `leveret up`:"
                    " restore the database, or begin anew with `leveret down --purge`"
                )
            network = await _network(connection)
            digest = hashlib.sha256(token.encode()).digest()
            # A token that is not in the file any more may be in somebody else's hands.
            await connection.execute(
                "UPDATE tokens SET revoked_at = now() WHERE name = $1 AND hash <> $2 AND revoked_at IS NULL",
                MADE_BY,
                digest,
            )
            await connection.execute(
                """
                INSERT INTO tokens (id, project_id, name, role, hash) VALUES ($1, $2, $3, 'admin', $4)
                ON CONFLICT (hash) DO NOTHING
                """,
                uuid.uuid4(),
                PROJECT,
                MADE_BY,
                digest,
            )
            for image in images:
                await connection.execute(
                    """
                    INSERT INTO images (name, url, sha256, format) VALUES ($1, $2, $3, 'qcow2')
                    ON CONFLICT (name) DO UPDATE SET url = excluded.url, sha256 = excluded.sha256
                    WHERE (images.url, images.sha256) <> (excluded.url, excluded.sha256)
                    """,
                    image.name,
                    image.url,
                    image.sha256,
                )
            names = await connection.fetch("SELECT name FROM images ORDER BY name")
    finally:
        await connection.close()
    return Furnished(network, tuple(row["name"] for row in names))


async def _network(connection: "asyncpg.Connection[asyncpg.Record]") -> IPv4Network:
    known = await connection.fetchval("SELECT cidr FROM networks WHERE name = $1", NETWORK)
    if known is not None:
        return IPv4Network(known)
    chosen = choose_network(routed_networks())
    await connection.execute(
        "SELECT create_network($1, $2::text::cidr, $3::text::inet, $4::text[]::inet[])",
        NETWORK,
        str(chosen),
        str(chosen[1]),
        resolvers(),
    )
    return chosen
