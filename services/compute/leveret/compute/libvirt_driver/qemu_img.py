"""qemu-img, at arm's length: explicit formats, a time limit, and limits on what a hostile image can make it use."""

import asyncio
import contextlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from leveret.shared.errors import Code, fail

ImageFormat = Literal["qcow2", "raw"]

QEMU_IMG = "qemu-img"
CPU_LIMIT_S = 30
#: Address space: what reading the metadata of an image needs, several times over.
MEMORY_LIMIT_BYTES = 1024**3
#: A new overlay of the largest disk has some MiB of tables.
FILE_LIMIT_BYTES = 1024**3

_QCOW2_MAGIC = b"QFI\xfb"
#: Incompatible features (QEMU's docs/interop/qcow2.txt): bit 2 is "external data file".
_EXTERNAL_DATA_FILE = 1 << 2
_KNOWN_INCOMPATIBLE = 0b11111
_LARGEST_BYTES = 64 * 1024 * 1024**3
_TAIL_BYTES = 500
_LAST_WAIT_S = 5.0
#: From util-linux. Python's own way, code between fork and exec, is not safe in a process with threads.
_LIMITED = (
    "prlimit",
    f"--cpu={CPU_LIMIT_S}",
    f"--as={MEMORY_LIMIT_BYTES}",
    f"--fsize={FILE_LIMIT_BYTES}",
    "--core=0",
    "--",
)


@dataclass(frozen=True, slots=True)
class Header:
    """What an image says of itself."""

    virtual_size_bytes: int
    backing_file: Path | None = None


def read_header(path: Path, image_format: ImageFormat) -> Header:
    """Read an image's header ourselves, before any other program looks at it. Blocking.

    Raises LeveretError (`image_invalid`) when it is not what it is declared to be, or refers to any other file
    than a backing file; that is the caller's to judge.
    """
    size = path.stat().st_size
    if image_format == "raw":
        if size == 0:
            raise _invalid("the raw image is empty")
        return Header(size)
    with path.open("rb") as file:
        head = file.read(104)
        if len(head) < 72 or head[:4] != _QCOW2_MAGIC:
            raise _invalid("it does not begin as a qcow2 image does")
        version, backing_offset, backing_bytes, cluster_bits, virtual_size, encryption = struct.unpack(
            ">IQIIQI", head[4:36]
        )
        if version not in {2, 3}:
            raise _invalid(f"qcow2 version {version} is not known")
        if version == 3:
            _check_features(head)
        if not 9 <= cluster_bits <= 21:
            raise _invalid(f"clusters of 2^{cluster_bits} bytes are not possible")
        if not 0 < virtual_size <= _LARGEST_BYTES:
            raise _invalid(f"a virtual size of {virtual_size} bytes is not possible")
        if encryption:
            raise _invalid("it is encrypted")
        if backing_offset == 0:
            return Header(virtual_size)
        if not 0 < backing_bytes <= 1023:
            raise _invalid("the name of its backing file has an impossible length")
        file.seek(backing_offset)
        name = file.read(backing_bytes)
    return Header(virtual_size, Path(name.decode(errors="surrogateescape")))


def _check_features(head: bytes) -> None:
    if len(head) < 104:
        raise _invalid("its header is cut short")
    incompatible = int.from_bytes(head[72:80])
    if incompatible & _EXTERNAL_DATA_FILE:
        raise _invalid("its data is in another file")
    if incompatible & ~_KNOWN_INCOMPATIBLE:
        raise _invalid("it uses qcow2 features that are not known")


async def check(path: Path, image_format: ImageFormat, *, timeout_s: float) -> int:
    """qemu-img's opinion of an image, which must be ours; its virtual size in bytes. Raises `image_invalid`."""
    output = await _run(
        "info", "--output=json", "-f", image_format, "--", str(path), code=Code.IMAGE_INVALID, timeout_s=timeout_s
    )
    try:
        said: dict[str, Any] = json.loads(output)
        virtual_size = int(said["virtual-size"])
    except (ValueError, KeyError, TypeError) as error:
        raise _invalid("qemu-img does not understand it") from error
    specific = (said.get("format-specific") or {}).get("data") or {}
    if said.get("format") != image_format or "backing-filename" in said or "data-file" in specific:
        raise _invalid("qemu-img sees another format, a backing file or a data file in it")
    if specific.get("corrupt"):
        raise _invalid("qemu-img says that it is corrupt")
    return virtual_size


async def create_overlay(path: Path, base: Path, base_format: ImageFormat, size_gib: int, *, timeout_s: float) -> None:
    """An empty layer over a base image. Raises `disk_full` or `disk_failed`."""
    arguments = ("-q", "-f", "qcow2", "-F", base_format, "-b", str(base), "--", str(path), f"{size_gib}G")
    await _run("create", *arguments, code=Code.DISK_FAILED, timeout_s=timeout_s)


async def _run(command: str, *arguments: str, code: Code, timeout_s: float) -> bytes:
    try:
        process = await asyncio.create_subprocess_exec(
            *_LIMITED,
            QEMU_IMG,
            command,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C"},
        )
    except OSError as error:
        raise fail(code, f"{QEMU_IMG} cannot be run: {error}") from error
    try:
        async with asyncio.timeout(timeout_s):
            output, errors = await process.communicate()
    except TimeoutError as error:
        raise fail(code, f"{QEMU_IMG} {command} took longer than {timeout_s:g} s.") from error
    finally:
        if process.returncode is None:
            process.kill()
            with contextlib.suppress(TimeoutError):  # a process that hangs in the kernel must not hang us
                async with asyncio.timeout(_LAST_WAIT_S):
                    await process.wait()
    if process.returncode != 0:
        said = errors[-_TAIL_BYTES:].decode(errors="replace").strip()
        full = "No space left on device" in said or "File too large" in said
        raise fail(Code.DISK_FULL if full else code, f"{QEMU_IMG} {command} ended with {process.returncode}: {said}")
    return output


def _invalid(why: str) -> Exception:
    return fail(Code.IMAGE_INVALID, f"The image cannot be used: {why}.")
