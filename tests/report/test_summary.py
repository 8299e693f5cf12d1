import numpy as np
import pytest

from llm_dynamics.frames import SQUEEZING, family_curves, squeezing_curves, what_moved
from llm_dynamics.report.families import STYLES, ordered, style_of

from .synthetic import FAMILIES, write_values

GREEDY = {"chosen-1": [-1.0, -0.5, -0.2], "chosen-2": [-3.0, -2.0, -1.0], "rejected-1": [-9.0, -8.0, -4.0]}


@pytest.fixture
def run(tmp_path):
    values = {
        "zebra-1": [-1, -1, -1], "rejected-1": [-30, -35, -50], "chosen-1": [-10, -11, -14],
        "chosen-2": [-20, -22, -22], "apple-1": [-2, -2, -1],
    }  # fmt: skip
    tokens = {"chosen-1": 2, "chosen-2": 4, "rejected-1": 5}
    return write_values(tmp_path / "run", values, n_tokens=tokens, columns={"argmax_logp_sum": GREEDY})


def test_table_equals_a_hand_computation(run):
    moved = what_moved(run).set_index("family")
    chosen = moved.loc["chosen"]
    assert chosen["n_probes"] == 2
    assert chosen["start"] == -15.0
    assert chosen["end"] == -18.0
    assert chosen["delta"] == -3.0
    assert chosen["delta_per_token"] == pytest.approx((-4 / 2 + -2 / 4) / 2)  # mean of ratios, not ratio of means
    assert moved.loc["rejected", "delta_per_token"] == -4.0


def test_families_come_in_canonical_order_then_unknown_ones_then_argmax(run):
    assert what_moved(run)["family"].tolist() == ["chosen", "rejected", "apple", "zebra", "argmax (chosen prefix)"]
    assert ordered([*reversed(STYLES), "b", "a"])[-5:-3] == ["a", "b"]
    assert ordered(reversed(FAMILIES)) == list(FAMILIES)


def test_argmax_row_is_taken_along_chosens_own_prefixes(run):
    argmax = what_moved(run).set_index("family").loc["argmax (chosen prefix)"]
    assert argmax["n_probes"] == 2
    assert argmax["delta"] == pytest.approx((0.8 + 2.0) / 2)  # rejected's prefixes, +5, do not enter


def test_argmax_row_falls_back_to_all_probes_without_a_chosen_family(tmp_path):
    greedy = {"a-1": [-4.0, -3.0, -2.0], "b-1": [-2.0, -2.0, -2.0]}
    run = write_values(
        tmp_path / "run", {"a-1": [-5, -5, -5], "b-1": [-6, -6, -6]}, columns={"argmax_logp_sum": greedy}
    )
    assert what_moved(run).set_index("family").loc["argmax", ["n_probes", "delta"]].tolist() == [2, 1.0]
    assert "argmax" in set(family_curves(run)["family"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 2])
def test_nonfinite_probes_are_left_out_of_means_and_counted(tmp_path, bad, place):
    spoilt = [-10.0, -10.0, -10.0]
    spoilt[place] = bad
    run = write_values(tmp_path / "run", {"chosen-1": [-10, -11, -12], "chosen-2": spoilt})
    row = what_moved(run).set_index("family").loc["chosen"]
    assert row[["n_probes", "n_nonfinite", "start", "end", "delta"]].tolist() == [2, 1, -10, -12, -2]


def test_a_family_without_any_finite_probe_has_no_mean_but_a_row(tmp_path):
    row = what_moved(write_values(tmp_path / "run", {"chosen-1": [-10, -11, np.nan]})).iloc[0]
    assert row["n_nonfinite"] == 1
    assert np.isnan(row["delta"])


def test_curves_equal_a_hand_computation(run):
    curves = family_curves(run).set_index(["family", "step"])
    assert curves.loc[("chosen", 10)].tolist() == pytest.approx([-16.5, -20.9, -12.1, 2])
    assert curves.loc[("argmax (chosen prefix)", 20), "mean"] == pytest.approx(-0.6)
    assert curves.loc[("argmax (rejected prefix)", 20), "mean"] == -4.0


def test_curves_per_token_divide_each_probe_by_its_own_length(run):
    curves = family_curves(run, per_token=True).set_index(["family", "step"])
    assert curves.loc[("chosen", 0), "mean"] == (-10 / 2 + -20 / 4) / 2
    assert curves.loc[("argmax (rejected prefix)", 0), "mean"] == -9 / 5


def test_change_subtracts_each_probes_own_start_before_percentiles(run):
    curves = family_curves(run, delta=True).set_index(["family", "step"])
    assert curves.loc[("chosen", 0)].tolist() == [0, 0, 0, 2]
    assert curves.loc[("chosen", 20), ["low", "high"]].tolist() == pytest.approx([-3.8, -2.2])  # of -4 and -2


def test_curves_leave_out_a_probe_only_where_it_is_not_finite(tmp_path):
    run = write_values(tmp_path / "run", {"chosen-1": [-10, -11, -12], "chosen-2": [-20, np.nan, -24]})
    chosen = family_curves(run).query("family == 'chosen'")
    assert chosen["n"].tolist() == [2, 1, 2]
    assert chosen["mean"].tolist() == [-15, -11, -18]


def test_squeezing_is_a_mean_over_tokens_not_over_probes(tmp_path):
    sums = {"collision_sum": {"chosen-1": [1.0, 1.0, 1.0], "chosen-2": [2.0, 2.0, np.nan]}}
    tokens = {"chosen-1": 2, "chosen-2": 8}
    run = write_values(tmp_path / "run", {"chosen-1": [-1] * 3, "chosen-2": [-1] * 3}, n_tokens=tokens, columns=sums)
    frame = squeezing_curves(run)
    assert frame["collision"].tolist() == pytest.approx([0.3, 0.3, 0.5])
    assert frame["n_nonfinite"].tolist() == [0, 0, 1]
    assert frame["entropy"].isna().all()  # not measured, so neither a number nor a fault
    assert list(frame.columns) == ["step", "family", *SQUEEZING, "n_nonfinite"]


def test_frames_of_a_run_without_observations_are_empty(tmp_path):
    run = write_values(tmp_path / "run", {"chosen-1": []}, steps=())
    for frame in (what_moved(run), family_curves(run), squeezing_curves(run)):
        assert frame.empty
        assert "family" in frame.columns


@pytest.mark.parametrize("family", [*STYLES, "of_this_run_alone"])
@pytest.mark.parametrize(("theme", "ground"), [("light", "#fdfcfa"), ("dark", "#15171a")])
def test_colours_of_families_can_be_read_as_text(family, theme, ground):
    def luminance(color):
        parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    darker, lighter = sorted([luminance(getattr(style_of(family), theme)), luminance(ground)])
    assert (lighter + 0.05) / (darker + 0.05) >= 4.5


def test_no_two_families_of_a_kind_share_dash_and_marker():
    looks = [(style.group, style.dash, style.symbol) for family, style in STYLES.items() if family != "argmax"]
    solid = [look for look in looks if look[1] == "solid"]
    assert len(set(looks)) == len(looks)
    assert len({group for group, *_ in solid}) == len(solid)
