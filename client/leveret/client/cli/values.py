"""What people write on a command line, as the numbers and documents that the API takes."""

import re
from pathlib import Path

import typer

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(?:i?B)?)?", re.IGNORECASE)
_BYTES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def size(text: str, *, unit: str) -> int:
    """`1536M`, `1.5G`, or a bare number of `unit`s (M or G), as a whole number of them."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise typer.BadParameter(f"{text!r} is no size: write for example 512M or 2G.")
    number, suffix = match.groups()
    units = float(number) * _BYTES[(suffix or unit).upper()] / _BYTES[unit]
    if units != int(units):
        raise typer.BadParameter(f"{text!r} is not a whole number of {unit}iB.")
    return int(units)


def pairs(texts: list[str]) -> dict[str, str]:
    """`key=value` as often as given."""
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"{text!r} is no label: write key=value.")
        if found.get(key, value) != value:
            raise typer.BadParameter(f"label {key!r} is given twice.")
        found[key] = value
    return found


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
