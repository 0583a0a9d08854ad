"""Image headers, read by ourselves before anything else looks at an untrusted image."""

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leveret.compute.libvirt_driver import qemu_img
from leveret.compute.libvirt_driver.qemu_img import Header
from leveret.shared.errors import Code, LeveretError

pytestmark = pytest.mark.unit

MIB = 1024 * 1024


def qcow2(
    *,
    magic: bytes = b"QFI\xfb",
    version: int = 3,
    backing: bytes = b"",
    backing_bytes: int | None = None,
    cluster_bits: int = 16,
    size: int = 64 * MIB,
    encryption: int = 0,
    incompatible: int = 0,
) -> bytes:
    """A header as QEMU writes it, with the backing file's name behind it."""
    offset = 112 if backing or backing_bytes else 0
    length = len(backing) if backing_bytes is None else backing_bytes
    head = magic + struct.pack(">IQIIQI", version, offset, length, cluster_bits, size, encryption)
    head = head.ljust(72, b"\0") + struct.pack(">Q", incompatible)
    return head.ljust(112, b"\0") + backing


def header(tmp_path: Path, content: bytes) -> Header:
    path = tmp_path / "image"
    path.write_bytes(content)
    return qemu_img.read_header(path, "qcow2")


def test_a_plain_image_tells_its_size(tmp_path: Path) -> None:
    assert header(tmp_path, qcow2(size=5 * MIB)) == Header(5 * MIB)
    assert header(tmp_path, qcow2(version=2)) == Header(64 * MIB)


def test_a_backing_file_is_named(tmp_path: Path) -> None:
    assert header(tmp_path, qcow2(backing=b"/pool/images/b.qcow2")).backing_file == Path("/pool/images/b.qcow2")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "does not begin"),
        (b"QFI\xfb", "does not begin"),
        (qcow2(magic=b"KDMV"), "does not begin"),
        (b"\0" * 4096, "does not begin"),
        (qcow2(version=1), "version 1"),
        (qcow2(version=4), "version 4"),
        (qcow2()[:80], "cut short"),
        (qcow2(incompatible=4), "another file"),
        (qcow2(incompatible=1 << 40), "not known"),
        (qcow2(cluster_bits=8), "clusters"),
        (qcow2(cluster_bits=63), "clusters"),
        (qcow2(size=0), "virtual size"),
        (qcow2(size=2**63), "virtual size"),
        (qcow2(encryption=1), "encrypted"),
        (qcow2(backing_bytes=2**31), "impossible length"),
    ],
)
def test_what_is_no_plain_qcow2_image_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    with pytest.raises(LeveretError, match=why) as caught:
        header(tmp_path, content)

    assert caught.value.problem.code is Code.IMAGE_INVALID


def test_a_raw_image_is_as_large_as_its_file(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"QFI\xfb" + b"\0" * 508)

    assert qemu_img.read_header(path, "raw") == Header(512)


def test_an_empty_raw_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.touch()

    with pytest.raises(LeveretError, match="empty"):
        qemu_img.read_header(path, "raw")


@given(noise=st.binary(max_size=200), start=st.sampled_from([b"", b"QFI\xfb", b"QFI\xfb\0\0\0\2", b"QFI\xfb\0\0\0\3"]))
def test_no_header_whatever_makes_the_reader_fail_in_another_way(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, start: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "noise"
    path.write_bytes(start + noise)
    try:
        qemu_img.read_header(path, "qcow2")
    except LeveretError as error:
        assert error.problem.code is Code.IMAGE_INVALID  # noqa: PT017
