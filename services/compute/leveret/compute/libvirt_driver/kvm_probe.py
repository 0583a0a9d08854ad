"""Whether KVM works: shown by a guest that runs, not by a device node that is there.

There are machines whose /dev/kvm opens and on which every guest hangs. The guest here is one sector that writes to
QEMU's debug-exit device, so that QEMU ends with a number of our choice; whatever hangs is killed.
"""

import asyncio
import contextlib
import json
import os
import platform
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from leveret.compute.libvirt_driver.paths import replacing

TIMEOUT_S = 5.0
_LAST_WAIT_S = 2.0
EMULATOR = "qemu-system-x86_64"

_EXIT_PORT = 0xF4
_TOKEN = 0x21
#: What QEMU makes of a byte written to isa-debug-exit.
EXIT_STATUS = _TOKEN << 1 | 1


@dataclass(frozen=True, slots=True)
class Finding:
    """Whether KVM is usable, and why that is thought."""

    usable: bool
    reason: str


def boot_sector() -> bytes:
    """A program for a bare x86 machine: 512 bytes that SeaBIOS loads to 0x7c00 and jumps to."""
    code = bytes(
        (
            *(0xB0, _TOKEN),  # mov al, 0x21
            *(0xBA, _EXIT_PORT, 0x00),  # mov dx, 0xf4
            0xEE,  # out dx, al
            0xFA,  # cli
            0xF4,  # hlt
            *(0xEB, 0xFD),  # jmp to the hlt
        )
    )
    return code.ljust(510, b"\0") + b"\x55\xaa"


async def find_out(pool_dir: Path, boot_id: str) -> Finding:
    """The finding for this boot of the host, probed once and then remembered in the pool."""
    remembered = pool_dir / "kvm-probe.json"
    try:
        note = json.loads(remembered.read_text())
        if note["boot_id"] == boot_id:
            return Finding(bool(note["usable"]), str(note["reason"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    finding = await probe()
    with replacing(remembered) as temporary:
        temporary.write_text(json.dumps({"boot_id": boot_id, **asdict(finding)}))
    return finding


async def probe() -> Finding:
    """Run a guest under KVM, where that can be done. On other machines than x86 the device node has to be believed."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return Finding(usable=False, reason="/dev/kvm is not there, or not for us.")
    if platform.machine() != "x86_64":
        return Finding(usable=True, reason=f"/dev/kvm is there; no guest was tried, this is {platform.machine()}.")
    return await run_guest("kvm")


async def run_guest(accelerator: Literal["kvm", "tcg"], *, timeout_s: float = TIMEOUT_S) -> Finding:
    """Run the tiny guest once. It ends, or is killed, within `timeout_s`."""
    with tempfile.TemporaryDirectory(prefix="leveret-probe-") as directory:
        sector = Path(directory) / "sector"
        sector.write_bytes(boot_sector())
        try:
            process = await asyncio.create_subprocess_exec(
                EMULATOR,
                *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
                *("-machine", "pc", "-accel", accelerator, "-m", "16"),
                # As our domains have it: there are machines whose KVM runs guests, but none with the host's own CPU.
                *(("-cpu", "host") if accelerator == "kvm" else ()),
                *("-device", f"isa-debug-exit,iobase={_EXIT_PORT:#x},iosize=1"),
                *("-drive", f"file={sector},format=raw,if=ide"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
            )
        except OSError as error:
            return Finding(usable=False, reason=f"{EMULATOR} cannot be run: {error.strerror}.")
        try:
            async with asyncio.timeout(timeout_s):
                status = await process.wait()
        except TimeoutError:
            return Finding(usable=False, reason=f"A guest of one sector did not end within {timeout_s:g} s: it hangs.")
        finally:
            if process.returncode is None:
                process.kill()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LAST_WAIT_S):
                        await process.wait()
    if status != EXIT_STATUS:
        return Finding(usable=False, reason=f"A guest of one sector ended QEMU with {status}, not {EXIT_STATUS}.")
    return Finding(usable=True, reason="A guest of one sector ran.")
