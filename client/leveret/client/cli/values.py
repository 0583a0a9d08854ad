"""What people write on a command line, as the numbers and documents that the API takes."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import typer

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(?:i?B)?)?", re.IGNORECASE)
_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}
_BYTES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def size(text: str, *, unit: str, option: str | None = None) -> int:
    """`1536M`, `1.5G`, or a bare number of `unit`s (M or G), as a whole number of them."""
    match = _SIZE.fullmatch(text.strip())
    if not match or len(text) > 32:
        raise typer.BadParameter(f"{text!r} is no size: write for example 512M or 2G.", param_hint=option)
    number, suffix = match.groups()
    units = float(number) * _BYTES[(suffix or unit).upper()] / _BYTES[unit]
    if units != int(units):
        raise typer.BadParameter(f"{text!r} is not a whole number of {unit}iB.", param_hint=option)
    return int(units)


def limit(text: str | None, *, option: str, unit: str | None = None) -> dict[str, int | None]:
    """A limit of a quota by its option: a number or a size, `none` for no limit, nothing when it was not given."""
    field = {"--memory": "memory_mib", "--disk": "disk_gib"}.get(option, option.lstrip("-").replace("-", "_"))
    if text is None:
        return {}
    if text.strip().lower() in {"none", "unlimited"}:
        return {field: None}
    if unit:
        return {field: size(text, unit=unit, option=option)}
    if not re.fullmatch(r"\d{1,18}", text.strip()):
        raise typer.BadParameter(f"{text!r} is no limit: write a number, or none.", param_hint=option)
    return {field: int(text)}


def expiry(text: str, now: datetime) -> datetime:
    """`30d`, `12h`, or a date: a day is meant to its end. What names no zone is local time."""
    text = text.strip()
    try:
        if match := re.fullmatch(r"(\d{1,6})\s*([mhdwy])", text):
            at = now + timedelta(seconds=int(match[1]) * _SECONDS[match[2]])
        elif re.fullmatch(r"\d{4}-\d\d-\d\d", text):
            at = datetime.fromisoformat(text).replace(hour=23, minute=59, second=59).astimezone(UTC)
        else:
            at = datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise typer.BadParameter(
            f"{text!r} is no time: write for example 30d, 12h or 2027-01-31.", param_hint="--expires"
        ) from error
    if at <= now:
        raise typer.BadParameter(f"{text!r} is over already.", param_hint="--expires")
    return at


def pairs(texts: list[str], *, option: str | None = None) -> dict[str, str]:
    """`key=value` as often as given."""
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"{text!r} is no label: write key=value.", param_hint=option)
        if found.get(key, value) != value:
            raise typer.BadParameter(f"label {key!r} is given twice.", param_hint=option)
        found[key] = value
    return found


def label_changes(texts: list[str]) -> dict[str, str | None]:
    """`key=value` sets a label, `key-` removes it."""
    removed = {text[:-1]: None for text in texts if text.endswith("-") and "=" not in text and len(text) > 1}
    given = [text for text in texts if text[:-1] not in removed or not text.endswith("-")]
    try:
        changes = pairs(given)
    except typer.BadParameter as error:
        raise typer.BadParameter(error.message.replace("key=value.", "key=value, or key- to remove it.")) from None
    if both := sorted(changes.keys() & removed.keys()):
        raise typer.BadParameter(f"label {both[0]!r} cannot be both set and removed.")
    return {**changes, **removed}


def public_keys(files: list[Path]) -> list[str]:
    """The OpenSSH public keys in some files, without repetition; empty lines and comments are left out."""
    keys: dict[str, None] = {}
    for file in files:
        try:
            text = file.expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise typer.BadParameter(f"cannot read the key {file}: {error}") from error
        if "PRIVATE KEY" in text:
            raise typer.BadParameter(f"{file} is a private key: give the public one, {file}.pub.")
        lines = (line.strip() for line in text.splitlines())
        keys.update(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    return list(keys)


def count(number: int, thing: str) -> str:
    """`1 VM`, `2 VMs`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def duration(seconds: float) -> str:
    """Rounded to what a person cares about: 0.04 s, 1.2 s, 3m12s, 5h02m, 12d."""
    if seconds < 0.095:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}h{minutes:02d}m"
    return f"{hours // 24}d"


def age(seconds: float) -> str:
    """One unit, for a column."""
    for unit, length_s in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length_s:
            return f"{int(seconds // length_s)}{unit}"
    return f"{max(0, int(seconds))}s"
