"""Sizes and durations are read as people write them, and written as they are read."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jhansi_runtime.errors import InvalidRequestError
from jhansi_runtime.quantities import duration_text, parse_duration, parse_size, size_text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1K", 1024),
        ("512M", 512 * 1024**2),
        ("512m", 512 * 1024**2),
        ("512MB", 512 * 1024**2),
        ("512MiB", 512 * 1024**2),
        ("1.5G", 3 * 1024**3 // 2),
        ("2T", 2 * 1024**4),
        ("100B", 100),
        ("0.3K", 307),
    ],
)
def test_a_size_is_bytes_in_powers_of_1024(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "M", "-1", "1 M", "1P", "1e6", "0x10", "nan", "inf", "1.M", ".5M", "1M\n", "\u0661K", "1iB", "9" * 40]
)
def test_what_is_no_size_is_refused_with_the_form_to_write(text):
    with pytest.raises(InvalidRequestError) as refusal:
        parse_size(text)
    assert repr(text) in refusal.value.message
    assert refusal.value.remedy


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 30.0),
        ("0.5", 0.5),
        ("30s", 30.0),
        ("500ms", 0.5),
        ("2h", 7200.0),
        ("1h30m", 5400.0),
        ("1.5h", 5400.0),
        ("1d", 86_400.0),
        ("1m1ms", 60.001),
    ],
)
def test_a_duration_is_seconds(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds, abs=1e-9)


@pytest.mark.parametrize(
    "text", ["", "s", "-1s", "1 s", "1w", "1e3", "nan", "inf", "infinity", "1h30", "30sec", "1s\n", "1_0", "\u0663s"]
)
def test_what_is_no_duration_is_refused_with_the_form_to_write(text):
    with pytest.raises(InvalidRequestError) as refusal:
        parse_duration(text)
    assert repr(text) in refusal.value.message
    assert refusal.value.remedy


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0"),
        (1023, "1023"),
        (1024, "1K"),
        (1536, "1.5K"),
        (64 * 1024**2, "64M"),
        (1024**3, "1G"),
        (1024**5, "1024T"),
    ],
)
def test_a_size_is_written_in_its_largest_unit(size, text):
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (0.5, "500ms"), (30.0, "30s"), (90, "1m30s"), (7200, "2h"), (86_400, "1d")]
)
def test_a_duration_is_written_in_whole_units(seconds, text):
    assert duration_text(seconds) == text


@settings(database=None)  # the checkout may be somebody else's
@given(st.integers(min_value=0, max_value=2**50))
def test_a_written_size_reads_back_to_within_its_one_decimal(size):
    assert parse_size(size_text(size)) == pytest.approx(size, rel=0.06)


@settings(database=None)
@given(st.integers(min_value=0, max_value=2**20), st.sampled_from([1, 1024, 1024**2, 1024**3]))
def test_a_size_of_whole_units_reads_back_exactly_where_it_is_written_whole(count, factor):
    text = size_text(count * factor)
    assert "." in text or parse_size(text) == count * factor


@settings(database=None)
@given(st.integers(min_value=0, max_value=10**12))
def test_a_written_duration_reads_back_to_the_millisecond(milliseconds):
    assert round(parse_duration(duration_text(milliseconds / 1000)) * 1000) == milliseconds


@settings(database=None)
@given(st.text(max_size=12))
def test_no_text_makes_the_parsers_fail_in_another_way(text):
    for parse in (parse_size, parse_duration):
        try:
            value = parse(text)
        except InvalidRequestError:
            continue
        assert value >= 0
