"""The books of explained steps: causes add up to what was measured, tokens to causes, and every detail agrees."""

import numpy as np
import pandas as pd
import pytest
import torch

from llm_dynamics.influence import by_example
from tests import training
from tests.callbacks.explained import CHOSEN, FAMILIES, by_family, explain, measured, observed_change
from tests.conftest import FIRST, SECOND
from tests.training import save_tiny_model

FLOAT32 = 2e-4
"""Nats by which a sum of float32 products of shares up to ten may differ between two ways of taking it."""
RUNS = {
    "sft-lora-dropout": ("sft", {"lora": True, "dropout": 0.2, "learning_rate": 5e-3}),
    "dpo-full": ("dpo", {"weight_decay": 0.1}),
    "kto-full-dropout": ("kto", {"dropout": 0.2}),
    "grpo-lora": ("grpo", {"lora": True, "temperature": 0.7, "learning_rate": 5e-3}),
    "rloo-full": ("rloo", {}),
    "plain-full-dropout": ("plain", {"dropout": 0.2}),
}
TARGETS = ("chosen", "rejected")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models without and with attention dropout."""
    return {p: save_tiny_model(tmp_path_factory.mktemp("model"), dropout=p) for p in (0.0, 0.2)}


@pytest.fixture(scope="module")
def explained(folders, tmp_path_factory):
    """Runs by name, and DPO runs by arguments of their account, each made once: trainer and run log."""
    runs = {}

    def run(name="dpo-full", **influence):
        key = f"{name} {influence}"
        if key not in runs:
            kind, arguments = RUNS[name]
            folder = folders[arguments.get("dropout", 0.0)]
            runs[key] = explain(kind, folder, tmp_path_factory.mktemp(name), influence=influence, **arguments)
        return runs[key]

    return run


@pytest.fixture(scope="module")
def dpo(explained):
    """The log of a DPO run explained by family, with a map of each chosen probe."""
    return explained(map_probes=CHOSEN)[1]


def assert_close(ours, theirs, atol=FLOAT32):
    options = {"check_names": False, "check_dtype": False, "check_index_type": False}
    pd.testing.assert_series_equal(ours, theirs, rtol=0, atol=atol, **options)


# ---- causes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_causes_add_up_to_the_change_between_two_observations(name, explained):
    _, run = explained(name) if name != "dpo-full" else explained(map_probes=CHOSEN)
    assert run.explained_steps == [1, 2]
    shares, change = by_family(run), measured(run)
    assert set(change.index) == {(step, family) for step in (1, 2) for family in FAMILIES}
    assert_close(shares.groupby(["step", "family"]).sum(), change, atol=1e-9)
    assert_close(change, observed_change(run))
    assert change.abs().max() > 0.1

    missed = shares.xs("remainder", level="cause")
    assert missed.abs().max() < 0.02 * change.abs().max()
    assert (run.accounts["explained"] > 0.999).all()
    np.testing.assert_allclose(
        run.accounts["explained"], 1 - (run.accounts["remainder_norm"] / run.accounts["measured_norm"]) ** 2
    )
    small = shares[shares.index.get_level_values("cause").isin(["rounding", "other"])]
    assert small.abs().max() < 1e-4  # these losses send nothing past the log-probs of labels
    assert "momentum" not in shares[1].index.get_level_values("cause")
    assert shares[2].xs("momentum", level="cause").abs().max() > 1e-3


def test_accounts_say_by_what_factor_gradients_were_clipped(explained):
    trainer, run = explained(map_probes=CHOSEN)
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    np.testing.assert_allclose(run.accounts["grad_norm"], norms, rtol=1e-5)
    assert min(norms) > 1  # so that clipping is active
    np.testing.assert_allclose(run.accounts["clip_factor"], [1 / (norm + 1e-6) for norm in norms], rtol=1e-5)
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    np.testing.assert_allclose(run.accounts["learning_rate"], rates)
    assert set(run.accounts["optimizer"]) == {"AdamW"}
    assert run.accounts["note"].isna().all()


def test_weight_decay_is_a_cause_where_there_is_some(explained, dpo):
    assert by_family(dpo).xs("decay", level="cause").abs().max() > 1e-4
    _, without = explained("rloo-full")
    assert "decay" not in set(without.influence["cause"])


@pytest.mark.parametrize("rule", ["start", "gauss2"])
def test_the_rule_decides_how_much_is_explained(rule, explained, dpo):
    _, run = explained(rule=rule, training_tokens=())
    assert set(run.accounts["rule"]) == {rule}
    missed, by_midpoint = (log.accounts["remainder_norm"] for log in (run, dpo))
    assert (missed > 3 * by_midpoint).all() if rule == "start" else (missed < by_midpoint / 3).all()


# ---- details ----------------------------------------------------------------------------------------------------


def test_probes_averaged_over_a_family_are_the_account_of_the_family(explained, dpo):
    _, run = explained(detail="probe", training_tokens=())
    assert set(run.influence["probe_id"]) == set(run.probes["probe_id"])
    mean = run.influence.groupby(["step", "family", "cause"])["share"].mean()
    assert_close(mean, by_family(dpo))
    assert_close(run.influence.groupby(["step", "family"])["measured"].mean(), measured(dpo))
    np.testing.assert_allclose(run.accounts["explained"], dpo.accounts["explained"], atol=1e-6)
    rows = dpo.influence
    assert rows["probe_id"].isna().all()
    assert set(rows["n_probes"]) == {2}
    assert set(run.influence["n_probes"]) == {1}


def test_tokens_summed_are_the_account_of_the_probe(explained):
    _, run = explained(detail="token", history="split", training_tokens=())
    _, by_probe = explained(detail="probe", training_tokens=())
    tokens = run.influence_tokens
    lengths = run.probes.set_index("probe_id")["response_ids"].map(len)
    for (_, probe, _), rows in tokens.groupby(["step", "probe_id", "cause"]):
        assert list(rows["position"]) == list(range(lengths[probe]))
    keys = ["step", "probe_id", "cause"]
    assert_close(tokens.groupby(keys)["share"].sum(), run.influence.set_index(keys)["share"].sort_index(), atol=1e-9)
    balance = tokens.groupby(["step", "probe_id", "position"]).agg({"share": "sum", "measured": "first"})
    assert_close(balance["share"], balance["measured"], atol=1e-9)
    whole = balance["measured"].groupby(["step", "probe_id"]).sum()
    assert_close(whole, by_probe.influence.groupby(["step", "probe_id"])["measured"].first())


def test_details_that_were_not_asked_for_are_not_there(explained):
    _, run = explained(detail="probe", training_tokens=())
    for table in ("influence_tokens", "training_tokens", "training_examples", "influence_maps"):
        assert len(getattr(run, table)) == 0
    assert run.influence["own_share"].isna().all()


# ---- training tokens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_training_tokens_add_up_to_the_causes_of_their_labels(name, explained):
    _, run = explained(name) if name != "dpo-full" else explained(map_probes=CHOSEN)
    tokens = run.training_tokens.query("kind == 'family'")
    assert list(tokens["target"].unique()) == ["chosen", "rejected"]  # the default
    cause = tokens["c"].map(lambda c: "up" if c < 0 else "down")
    summed = tokens.groupby(["step", "target", cause])["share"].sum().sort_index()
    shares = by_family(run)
    labels = shares[shares.index.get_level_values("cause").isin(["up", "down"])]
    assert_close(summed, labels[labels.index.get_level_values("family").isin(TARGETS)], atol=1e-3)
    assert labels.abs().max() > 0.1


def test_tokens_are_those_of_the_examples_and_their_coefficients_add_up(dpo):
    tokens = dpo.training_tokens.query("target == 'chosen'").groupby(["step", "example"])
    examples = dpo.training_examples.set_index(["step", "example"])
    assert_close(tokens["c"].sum(), examples["c_sum"], atol=1e-6)
    assert_close(tokens.size(), examples["n_tokens"])
    assert_close(tokens["token"].sum(), examples["response"])
    assert tokens["position"].apply(lambda places: list(places) == list(range(len(places)))).all()
    assert (examples["c_sum"][examples["role"] == "chosen"] < 0).all()
    assert (examples["c_sum"][examples["role"] == "rejected"] > 0).all()
    assert set(examples["prompt_id"].dropna()) == {FIRST, SECOND}


def test_own_share_is_what_examples_with_the_probes_prompt_did(dpo):
    """By hand: the mean over the family's probes of the shares of the tokens of examples with each one's prompt."""
    owners = dpo.training_examples.set_index(["step", "example"])["prompt_id"]
    tokens = dpo.training_tokens.query("kind == 'probe'").join(owners, on=["step", "example"])
    assert set(tokens["target"]) == set(CHOSEN)
    own = tokens[tokens["prompt_id"] == tokens["target"].str.split("/").str[0]]
    by_hand = own.groupby(["step", own["c"].map(lambda c: "up" if c < 0 else "down")])["share"].sum() / len(CHOSEN)
    chosen = dpo.influence.query("family == 'chosen' and cause in ('up', 'down')")
    logged = chosen.set_index(["step", "cause"])["own_share"].sort_index()
    assert_close(logged, by_hand, atol=1e-3)
    assert logged.abs().min() > 0.1
    assert (chosen["own_share"] - chosen["share"]).abs().min() > 0.1  # others took part too


def test_own_share_is_null_where_it_was_not_measured(dpo):
    measured_ones = dpo.influence[dpo.influence["own_share"].notna()]
    assert set(measured_ones["cause"]) == {"up", "down"}
    assert set(measured_ones["family"]) == {"chosen", "rejected"}


@pytest.mark.parametrize("name", ["dpo-full", "sft-lora-dropout"])
def test_a_map_summed_over_probe_tokens_is_the_share_of_each_training_token(name, explained):
    _, run = explained(name, map_probes=CHOSEN if name == "dpo-full" else CHOSEN[:1])
    maps, tokens = run.influence_maps, run.training_tokens.query("kind == 'probe'")
    lengths = run.probes.set_index("probe_id")["response_ids"].map(len)
    assert set(maps["probe_id"]) == set(tokens["target"])
    for (step, probe), rows in maps.groupby(["step", "probe_id"]):
        mine = tokens[(tokens["step"] == step) & (tokens["target"] == probe)]
        strongest = mine.groupby("example")["share"].sum().abs().idxmax()
        assert set(rows["example"]) == {strongest}
        assert list(rows["m"].unique()) == list(range(lengths[probe]))
        shares = mine[mine["example"] == strongest].set_index("position")["share"]
        assert_close(rows.groupby("l")["share"].sum(), shares)
        assert shares.abs().sum() > 0.05


def always_one(completions, **_):
    return [1.0] * len(completions)


def test_a_step_whose_loss_has_no_tokens_has_an_account_all_the_same(folders, tmp_path, monkeypatch):
    """Groups with equal rewards have no advantage: nothing is asked of any token, and nothing moves."""
    monkeypatch.setattr(training, "many_letters", always_one)
    _, run = explain("grpo", folders[0.0], tmp_path, influence={"map_probes": CHOSEN[:1]}, max_steps=1)
    assert set(run.influence["cause"]) == {"other", "rounding", "remainder"}
    assert (run.influence["share"] == 0).all()
    assert run.accounts["explained"].isna().all()  # there is no share of nothing
    assert len(run.training_examples) == 4
    assert (run.training_examples["c_sum"] == 0).all()
    assert len(run.training_tokens) == len(run.influence_maps) == 0


# ---- what is asked for ------------------------------------------------------------------------------------------


def test_only_the_families_asked_for_are_accounted_for(explained, dpo):
    _, run = explained(families=("rejected",))
    assert set(run.influence["family"]) == {"rejected"}
    assert set(run.training_tokens["target"]) == {"rejected"}
    rejected = by_family(dpo).xs("rejected", level="family", drop_level=False)
    assert_close(by_family(run), rejected)


def test_training_tokens_are_told_for_probes_too_and_as_often_as_asked_for(explained, dpo):
    _, run = explained(training_tokens=("other_train", CHOSEN[1]), tokens_every=2)
    tokens = run.training_tokens
    assert set(zip(tokens["target"], tokens["kind"], strict=True)) == {
        ("other_train", "family"),
        (CHOSEN[1], "probe"),
    }
    keys = ["step", "example", "position"]
    ours, theirs = (log.training_tokens.query("target == @CHOSEN[1]").set_index(keys)["share"] for log in (run, dpo))
    assert_close(ours, theirs)
    _, fewer = explained(training_tokens=("chosen",), tokens_every=3)
    for table in ("training_tokens", "training_examples"):
        assert list(getattr(fewer, table)["step"].unique()) == [1]
    up = "family == 'chosen' and cause == 'up'"
    own, whole = (log.influence.query(up).set_index("step")["own_share"] for log in (fewer, dpo))
    assert_close(own, whole)  # told at every explained step all the same


def test_splitting_by_role_gives_chosen_and_rejected_as_causes(explained, dpo):
    _, run = explained(split_by="role", training_tokens=("chosen",))
    shares, by_sign = by_family(run), by_family(dpo)
    for role, sign in (("chosen", "up"), ("rejected", "down")):  # in DPO they are the same tokens
        assert_close(shares.xs(role, level="cause"), by_sign.xs(sign, level="cause"))
    own = run.influence.set_index(["step", "family", "cause"])["own_share"]
    theirs = dpo.influence.set_index(["step", "family", "cause"])["own_share"]
    for step in (1, 2):
        assert own[step, "chosen", "rejected"] == pytest.approx(theirs[step, "chosen", "down"], abs=1e-3)


def by_place(batch):
    """A labelling that looks at the whole micro-batch: its last row, whose prompt no probe has, and the others."""
    last = torch.arange(len(batch.labels), device=batch.labels.device)[:, None] == len(batch.labels) - 1
    return {"last": last.expand(batch.labels.shape), "others": ~last.expand(batch.labels.shape)}


@pytest.mark.parametrize(("labelling", "causes"), [(by_example, "example_"), (by_place, ("last", "others"))])
def test_tokens_can_be_labelled_by_any_function(labelling, causes, explained, dpo):
    _, run = explained(split_by=labelling, training_tokens=("chosen",))
    shares, by_sign = by_family(run), by_family(dpo)
    ours = shares[shares.index.get_level_values("cause").str.startswith(causes)]
    signs = by_sign[by_sign.index.get_level_values("cause").isin(["up", "down"])]
    whole = ours.groupby(["step", "family"]).sum()
    assert_close(whole, signs.groupby(["step", "family"]).sum())
    assert ours.index.get_level_values("cause").nunique() == (8 if labelling is by_example else 2)
    own, theirs = (log.influence.query("family == 'chosen'").groupby("step")["own_share"].sum() for log in (run, dpo))
    assert_close(own, theirs, atol=1e-3)
    if labelling is by_place:
        last = run.influence.query("cause == 'last' and family == 'chosen'")
        assert last["share"].abs().min() > 0.1
        assert (last["own_share"] == 0).all()


def test_momentum_split_by_its_past_adds_up_to_momentum(explained, dpo):
    _, run = explained(detail="token", history="split", training_tokens=())
    mean = run.influence.groupby(["step", "family", "cause"])["share"].mean()
    cause = mean.index.get_level_values("cause")
    assert "momentum_up" not in mean[1].index.get_level_values("cause")
    parts = mean[cause.str.startswith("momentum")][2]
    whole = by_family(dpo).xs("momentum", level="cause")[2]
    assert_close(parts.groupby("family").sum(), whole)
    assert parts.xs("momentum", level="cause").abs().max() < 1e-4  # every step was seen: nothing is left over
    assert parts.xs("momentum_up", level="cause").abs().max() > 0.01
    others = mean[~cause.str.startswith("momentum")]
    assert_close(others, by_family(dpo).drop("momentum", level="cause"))
