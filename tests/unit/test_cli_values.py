"""What people write, as what the API takes."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import typer

from leveret.client.cli.values import age, duration, expiry, label_changes, limit, pairs, public_keys, size

pytestmark = pytest.mark.unit

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHh5ZXRhbm90aGVyc2lsbHlrZXkxMjM0NTY3ODkw me@here"


@pytest.mark.parametrize(
    ("text", "unit", "expected"),
    [
        ("512M", "M", 512),
        ("512", "M", 512),
        ("1G", "M", 1024),
        ("1.5GiB", "M", 1536),
        ("2gb", "M", 2048),
        ("1048576K", "M", 1024),
        ("10", "G", 10),
        ("1T", "G", 1024),
        ("10240M", "G", 10),
    ],
)
def test_sizes(text: str, unit: str, expected: int) -> None:
    assert size(text, unit=unit) == expected


@pytest.mark.parametrize(
    ("text", "unit"), [("", "M"), ("big", "M"), ("-1G", "M"), ("1K", "M"), ("1.5G", "G"), ("1 G B", "G")]
)
def test_what_is_no_size_is_a_usage_error(text: str, unit: str) -> None:
    with pytest.raises(typer.BadParameter):
        size(text, unit=unit)


def test_labels() -> None:
    assert pairs(["a=1", "b=", "a=1", "c=x=y"]) == {"a": "1", "b": "", "c": "x=y"}


@pytest.mark.parametrize("texts", [["a"], ["=1"], ["a=1", "a=2"]])
def test_what_is_no_label_is_a_usage_error(texts: list[str]) -> None:
    with pytest.raises(typer.BadParameter):
        pairs(texts)


def test_keys_are_taken_once_and_comments_left_out(tmp_path: Path) -> None:
    one, two = tmp_path / "one.pub", tmp_path / "two.pub"
    one.write_text(f"# mine\n{KEY}\n\n")
    two.write_text(f"{KEY}\n")
    assert public_keys([one, two]) == [KEY]


def test_a_private_key_is_refused_and_never_shown(tmp_path: Path) -> None:
    private = tmp_path / "id"
    private.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nc2VjcmV0\n")
    with pytest.raises(typer.BadParameter, match="private key") as caught:
        public_keys([private])
    assert "c2VjcmV0" not in str(caught.value)


def test_a_label_is_set_with_equals_and_removed_with_a_dash() -> None:
    assert label_changes(["a=1", "b-", "c=x-"]) == {"a": "1", "b": None, "c": "x-"}


@pytest.mark.parametrize("texts", [["a"], ["-"], ["a=1", "a-"], ["=1"]])
def test_what_is_no_change_of_a_label_is_a_usage_error(texts: list[str]) -> None:
    with pytest.raises(typer.BadParameter):
        label_changes(texts)


NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30d", NOW + timedelta(days=30)),
        ("12h", NOW + timedelta(hours=12)),
        ("2w", NOW + timedelta(weeks=2)),
        ("2027-01-31T10:00:00+00:00", datetime(2027, 1, 31, 10, tzinfo=UTC)),
    ],
)
def test_times_to_expire_at(text: str, expected: datetime) -> None:
    assert expiry(text, NOW) == expected


def test_a_day_is_meant_to_its_end() -> None:
    assert expiry("2027-01-31", NOW).astimezone().strftime("%Y-%m-%d %H:%M:%S") == "2027-01-31 23:59:59"


@pytest.mark.parametrize("text", ["", "soon", "30", "0d", "-1d", "2020-01-01", "2027-13-01", "999999y"])
def test_what_is_no_time_to_come_is_a_usage_error(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        expiry(text, NOW)


def test_limits() -> None:
    assert limit(None, option="--vms") == {}
    assert limit("none", option="--vms") == {"vms": None}
    assert limit("10", option="--vcpus") == {"vcpus": 10}
    assert limit("64G", option="--memory", unit="M") == {"memory_mib": 65536}
    assert limit("1T", option="--disk", unit="G") == {"disk_gib": 1024}


@pytest.mark.parametrize(("text", "unit"), [("-1", None), ("1.5", None), ("many", None), ("lots", "M")])
def test_what_is_no_limit_is_a_usage_error_that_names_the_option(text: str, unit: str | None) -> None:
    with pytest.raises(typer.BadParameter) as caught:
        limit(text, option="--memory" if unit else "--vms", unit=unit)
    assert caught.value.param_hint in {"--memory", "--vms"}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.004, "0.00 s"),
        (0.04, "0.04 s"),
        (1.24, "1.2 s"),
        (59.94, "59.9 s"),
        (192, "3m12s"),
        (18120, "5h02m"),
        (1e6, "11d"),
    ],
)
def test_durations_are_rounded_to_what_one_cares_about(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("seconds", "text"), [(-2, "0s"), (119, "119s"), (120, "2m"), (7200, "2h"), (172800, "2d")])
def test_ages_have_one_unit(seconds: float, text: str) -> None:
    assert age(seconds) == text
