"""How numbers are written: one rule each, and never the same text for what a limit tells apart."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_dynamics.frames.numbers import nats, percent, seconds


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (-118.04, "-118.0"), (26.05, "26.1"), (9.996, "10.0"), (-4.5, "-4.50"), (0.9996, "1.00"), (0.41, "0.410"),
        (0.0123, "0.0123"), (0.00012, "0.0001"), (-2.34e-5, "-2.3e-05"), (0.0, "0.0"), (-0.0, "0.0"),
        (math.nan, "–"), (math.inf, "–"),
    ],
)  # fmt: skip
def test_nats_have_three_significant_digits_and_one_to_four_decimals(value, said):
    assert nats(value) == said
    assert nats(value, sign=True) == (f"+{said}" if value > 0 and math.isfinite(value) else said)


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (0.41, "41%"), (0.4123, "41.2%"), (0.042, "4.2%"), (0.0042, "0.42%"), (1.928, "193%"), (0.0, "0%"),
        (1.0, "100%"),
        (0.899, "89.9%"), (0.949, "94.9%"), (0.99986, "99.986%"), (1 - 1e-9, "more than 99.9999%"), (-3.0, "-300%"),
        (math.nan, "–"),
    ],
)  # fmt: skip
def test_percent_is_told_from_100_and_from_limits(share, said):
    assert percent(share) == said


@given(st.floats(-1e6, 1e6).filter(lambda value: value == 0 or abs(value) > 1e-30))
def test_what_is_written_is_the_number(value):
    assert float(nats(value)) == pytest.approx(value, rel=0.006, abs=6e-5)
    assert (float(nats(value)) == 0) is (value == 0)


@pytest.mark.parametrize(("value", "said"), [(0.04, "0.0 s"), (17.5, "17.5 s"), (192.8, "193 s")])
def test_seconds(value, said):
    assert seconds(value) == said
