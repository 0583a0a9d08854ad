"""The part of `doctor` that looks at the API: name, port, certificate, answer, token, clock, what stands behind it."""

import socket
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

from leveret.client.cli.session import run
from leveret.client.cli.values import age, count
from leveret.client.config import Config
from leveret.client.errors import ApiError, ClientError
from leveret.client.finding import Finding, fail, ok, warn

if TYPE_CHECKING:
    import httpx2

    from leveret.client.leveret import Leveret
    from leveret.shared.documents import HostView, ProjectView

_TIMEOUT_S = 5.0
#: The header tells whole seconds.
_CLOCKS_APART_S = 3.0
_EXPIRES_SOON = timedelta(days=7)
#: A host that was heard of so lately, in seconds, is there.
_LATELY_S = 60
_NEARLY = 0.9
_START = "`leveret status` shows what runs on this machine, `leveret up` starts it."


class _Stop(Exception):
    """Nothing behind this can be looked at."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.text)
        self.finding = finding


def api_findings(settings: Config) -> Iterator[Finding]:
    """One after the other, until one fails without which the next means nothing."""
    try:
        yield from _connection(urlsplit(settings.url))
        response = _ask(f"{settings.url}/version")
        yield from _version(response)
        yield from _clock(response)
        yield from _readiness(_ask(f"{settings.url}/readyz"))
        yield from _with_token(settings)
    except _Stop as stop:
        yield stop.finding


def _connection(url: SplitResult) -> Iterator[Finding]:
    """The steps of reaching a server, apart from each other."""
    host, secure = str(url.hostname), url.scheme == "https"
    port = url.port or (443 if secure else 80)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise _Stop(
            fail("dns", f"{host} has no address: {error.strerror}.", "correct the url, or the resolver.")
        ) from None
    addresses = ", ".join(dict.fromkeys(str(one[4][0]) for one in found))
    yield ok("dns", f"{host} is {addresses}" if host != addresses else f"{host} is an address")
    started = time.monotonic()
    try:
        connection = socket.create_connection((host, port), timeout=_TIMEOUT_S)
    except OSError as error:
        reason = error.strerror or "nothing answers in time"
        raise _Stop(fail("tcp", f"{host} port {port}: {reason}.", _START)) from None
    with connection:
        yield ok("tcp", f"port {port} answers in {(time.monotonic() - started) * 1000:.0f} ms")
        if not secure:
            if host not in {"localhost", "127.0.0.1", "::1"}:
                yield warn("tls", "the token goes over the network unencrypted.", "serve the API with TLS: https.")
            return
        try:
            with ssl.create_default_context().wrap_socket(connection, server_hostname=host) as secured:
                expires_at = datetime.fromtimestamp(ssl.cert_time_to_seconds(_not_after(secured)), UTC)
        except ssl.SSLCertVerificationError as error:
            advice = "install the authority's certificate, or point SSL_CERT_FILE at it."
            raise _Stop(fail("tls", f"the certificate is not trusted: {error.verify_message}.", advice)) from None
        except (OSError, ValueError) as error:
            raise _Stop(fail("tls", f"no TLS there: {_reason(error)}.", "check the url's port, or use http.")) from None
    left = expires_at - datetime.now(UTC)
    if left < _EXPIRES_SOON:
        yield warn("tls", f"the certificate ends in {age(left.total_seconds())}.", "renew it.")
    else:
        yield ok("tls", f"certificate trusted, until {expires_at:%Y-%m-%d}")


def _reason(error: OSError | ValueError) -> str:
    """What OpenSSL says in words, without where in its sources it says so."""
    return str(getattr(error, "reason", None) or error).replace("_", " ").lower()


def _not_after(secured: ssl.SSLSocket) -> str:
    return str((secured.getpeercert() or {}).get("notAfter", ""))


def _ask(url: str) -> "httpx2.Response":
    import httpx2

    try:
        return httpx2.get(url, timeout=_TIMEOUT_S, verify=ssl.create_default_context() if "https:" in url else False)
    except httpx2.TransportError as error:
        raise _Stop(fail("http", f"no answer: {error or type(error).__name__}.", _START)) from None


def _version(response: "httpx2.Response") -> Iterator[Finding]:
    ours = version("leveret")
    try:
        theirs = str(response.json()["version"])
    except (ValueError, KeyError, TypeError):
        text = f"{response.url} is no Leveret: it answers {response.status_code} without a version."
        raise _Stop(fail("http", text, "correct the url.")) from None
    yield ok("http", f"the API answers, version {theirs}")
    if ours.split(".")[:2] != theirs.split(".")[:2]:
        yield warn("versions", f"this command is {ours}, the API is {theirs}.", "use the same release of both.")


def _clock(response: "httpx2.Response") -> Iterator[Finding]:
    try:
        apart_s = datetime.now(UTC).timestamp() - parsedate_to_datetime(response.headers["date"]).timestamp()
    except (KeyError, ValueError):
        return  # a proxy that sends no date
    if abs(apart_s) > _CLOCKS_APART_S:
        side = "ahead of" if apart_s > 0 else "behind"
        text = f"this machine is {abs(apart_s):.0f} s {side} the API: times and expiries are judged by the API's clock."
        yield warn("clock", text, "run NTP on both, such as chrony.")
    else:
        yield ok("clock", "agrees with the API's")


def _readiness(response: "httpx2.Response") -> Iterator[Finding]:
    """What the API says of its own dependencies."""
    try:
        parts: dict[str, Any] = response.json()["dependencies"]
    except (ValueError, KeyError, TypeError):
        yield warn(
            "readiness", f"/readyz answers {response.status_code} without saying more.", "look at the API's log."
        )
        return
    for name, part in parts.items():
        title = name.replace("_", " ")
        if part.get("ok"):
            yield ok(title, "the API has it")
        elif name == "event_feed":
            yield warn(title, str(part.get("why", "")), "waits are slower; look at the API's log.")
        else:
            yield fail(title, str(part.get("why", "")), f"look at it and at the API's log; {_START}")


def _with_token(settings: Config) -> Iterator[Finding]:
    from leveret.client.leveret import Leveret

    async def look() -> list[Finding]:
        async with Leveret(settings.url, settings.token, retry_for_s=0.0) as leveret:
            identity = await leveret.whoami()
            found = [*_token(identity)]
            found += await _tolerant("quota", _quota(leveret, str(identity["project"])))
            if identity.get("role") == "admin":
                found += await _tolerant("hosts", _hosts(leveret))
            return found

    try:
        yield from run(look())
    except ApiError as error:
        level = fail if error.status in {401, 403} else warn
        yield level("token", f"{error.message}", "`leveret context add NAME --url URL --replace` takes another token.")
    except ClientError as error:
        yield fail("token", str(error), _START)


async def _tolerant(name: str, looking: Any) -> list[Finding]:
    try:
        return list(await looking)
    except ClientError as error:
        return [warn(name, f"cannot be seen: {error}.", "look at the API's log.")]


def _token(identity: dict[str, Any]) -> Iterator[Finding]:
    token = identity.get("token") or {}
    who = f"{token.get('name', '?')}, {identity.get('role')} of project {identity.get('project')}"
    if not token.get("expires_at"):
        yield ok("token", f"{who}, never expires")
        return
    expires_at = datetime.fromisoformat(token["expires_at"])
    until = f"{expires_at.astimezone():%Y-%m-%d %H:%M}"
    if expires_at - datetime.now(UTC) < _EXPIRES_SOON:
        yield warn("token", f"{who}, expires {until}.", "have another one made: `leveret token create`.")
    else:
        yield ok("token", f"{who}, until {until}")


async def _quota(leveret: "Leveret", project: str) -> Iterator[Finding]:
    return quota(await leveret.project(project))


def quota(project: "ProjectView") -> Iterator[Finding]:
    limits, used = project.quota.model_dump(), project.usage.model_dump()
    tight = [
        f"{used[name]} of {limits[name]} {name.replace('_', ' ')}"
        for name in used
        if limits.get(name) is not None and used[name] >= _NEARLY * limits[name]
    ]
    if tight:
        yield warn("quota", f"nearly used up: {', '.join(tight)}.", "delete VMs, or ask an administrator for more.")
    else:
        yield ok("quota", f"{count(used['vms'], 'VM')} in project {project.id}, within its limits")


async def _hosts(leveret: "Leveret") -> Iterator[Finding]:
    return hosts(await leveret.hosts())


def _undead(found: "tuple[HostView, ...]") -> Iterator[Finding]:
    """Hosts that are not as they were said to be, or as they should be."""
    from leveret.client.cli.columns import seconds_since

    for host in found:
        if host.state == "retired" and seconds_since(host.heartbeat_at) < _LATELY_S:
            advice = "stop its worker and its guests: what is over there may run a second time elsewhere."
            yield fail("hosts", f"{host.name} was retired, and is still heard of.", advice)
        elif host.state == "up" and host.problem is not None:
            yield warn("hosts", f"{host.name} gets no new VMs: {host.problem.message}", host.problem.hint)


def hosts(found: "tuple[HostView, ...]") -> Iterator[Finding]:
    """Whether there is somebody to build VMs, and nobody who should not be there."""
    yield from _undead(found)
    by_state: dict[str, list[str]] = {}
    for host in found:
        if host.state != "retired":
            by_state.setdefault(host.state, []).append(host.name)
    useful = [host for host in found if host.state == "up"]
    if not by_state:
        yield fail(
            "hosts", "there is none: nothing can be built.", "start leveret-compute on a machine, or `leveret up`."
        )
        return
    for state, names in by_state.items():
        if state != "up":
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            advice = {
                "silent": "look at leveret-compute and its log there; nothing on it is touched until it is back. One "
                "that is certainly off can be fenced: `leveret host fence --help`.",
                "cordoned": "`leveret hosts` says why nothing is placed on it; `leveret host uncordon` lets it work.",
                "fenced": "`leveret host show` says what can be done.",
            }.get(state, "`leveret hosts` says more.")
            yield (warn if useful else fail)("hosts", f"{len(names)} {state}: {some}.", advice)
    full = [
        host
        for host in useful
        if host.vcpus_used >= host.vcpus
        or host.memory_mib_used >= _NEARLY * host.memory_mib
        or host.disk_gib_used >= _NEARLY * host.disk_gib
    ]
    if useful and len(full) == len(useful):
        yield warn("hosts", f"all {len(useful)} that are up are nearly full.", "delete VMs, or add a host.")
    elif useful:
        yield ok("hosts", f"{len(useful)} up, {len(full)} of them nearly full")
