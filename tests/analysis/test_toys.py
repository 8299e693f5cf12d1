"""The toy figures of `analysis/figures` run to their end, and their numbers are those of slow, obvious twins."""

import copy
import importlib
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from llm_dynamics.demo.tiny import build_tiny_model

FIGURES = Path(__file__).parents[2] / "analysis" / "figures"


@pytest.fixture(scope="module", autouse=True)
def figures_on_path():
    sys.path.insert(0, str(FIGURES))
    yield
    sys.path.remove(str(FIGURES))


def script(name):
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Run a script with --quick, once in this module; returns its numbers and its picture."""
    done = {}

    def run(name):
        if name not in done:
            out = tmp_path_factory.mktemp("figures") / name
            script(name).main(["--quick", "--out", str(out)])
            assert out.with_suffix(".pdf").stat().st_size > 5000
            done[name] = pd.read_csv(out.with_suffix(".csv")), matplotlib.image.imread(out.with_suffix(".png"))
        return done[name]

    return run


def numbers(made, name, panel, quantity):
    frame = made(name)[0]
    return frame[(frame["panel"] == panel) & (frame["quantity"] == quantity)]


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        ("toy_one_step", 3, 2),
        ("toy_accumulated", 2, 2),
        ("toy_squeezing", 2, 2),
        ("toy_squeezing_trends", 3, 2),
        ("appendix_c", 3, 2),
    ],
)
def test_every_panel_shows_something(made, name, rows, columns):
    picture = made(name)[1][..., :3]
    height, width = picture.shape[0] // rows, picture.shape[1] // columns
    for row in range(rows):
        for column in range(columns):
            panel = picture[row * height : (row + 1) * height, column * width : (column + 1) * width]
            ink = (panel.min(axis=2) < 0.9).mean()
            colour = ((panel.max(axis=2) - panel.min(axis=2)) > 0.2).mean()
            assert 0.02 < ink < 0.8
            assert colour > 0.001


# --- one step on digits


def quick_classifier():
    """What `toy_one_step --quick` steps from: the data, and the weights of step 120, in a plain module too."""
    toy = script("toy_digits")
    train, held_out = toy.load(0)
    classifier = toy.Classifier(0, hidden=16)
    path = toy.sgd(classifier, train, steps=120, learning_rate=0.1, seed=0)
    weights = [weights for _, weights, _ in path][-1]
    module = copy.deepcopy(classifier.network)
    module.load_state_dict(weights)
    return train.some_of_each(2), held_out.some_of_each(2), classifier, weights, module


def test_sgd_is_what_torch_does():
    toy = script("toy_digits")
    train, _ = toy.load(0)
    classifier = toy.Classifier(0, hidden=16)
    module = copy.deepcopy(classifier.network)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    seen = 0
    for step, weights, batch in toy.sgd(classifier, train, steps=70, learning_rate=0.1, seed=3):
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(weights[name], parameter, rtol=0, atol=1e-12)
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(batch.images), batch.labels).backward()
        optimizer.step()
        seen = step
    assert seen == 70


def test_heat_maps_of_one_step_are_those_of_an_optimizer_s_step(made):
    trained, observed, _, _, module = quick_classifier()
    before = module(observed.images).log_softmax(1).detach()
    pulled, own = np.zeros((10, 10)), np.zeros((10, 10))
    for image, label in zip(trained.images, trained.labels, strict=True):
        one = copy.deepcopy(module)
        optimizer = torch.optim.SGD(one.parameters(), lr=0.02)
        nn.functional.cross_entropy(one(image[None]), label[None]).backward()
        optimizer.step()
        after = one(observed.images).log_softmax(1).detach()
        for place, digit in enumerate(observed.labels.tolist()):
            pulled[label, digit] += float((after.exp() - before.exp())[place, label]) / 4
            own[label, digit] += float((after - before)[place, digit]) / 4
    for panel, quantity, twin in (
        ("b", "change of p of the trained class", pulled),
        ("c", "change of log p of the own class", own),
    ):
        table = numbers(made, "toy_one_step", panel, quantity).pivot(
            index="trained", columns="observed", values="value"
        )
        np.testing.assert_allclose(table.to_numpy(), twin, rtol=1e-4, atol=1e-9)


def test_exact_kernel_is_that_of_single_gradients():
    trained, observed, classifier, weights, module = quick_classifier()
    toy = script("toy_digits")
    images = observed.images[:2], trained.images[:3]
    k = toy.kernel(*(classifier.jacobian(weights, part) for part in images))

    def gradient(image, output):
        grads = torch.autograd.grad(module(image[None])[0, output], list(module.parameters()))
        return torch.cat([g.flatten() for g in grads])

    for o, u, i, j in ((0, 0, 0, 0), (1, 2, 3, 7), (0, 1, 9, 4)):
        expected = gradient(images[0][o], i) @ gradient(images[1][u], j)
        torch.testing.assert_close(k[o, u, i, j], expected, rtol=1e-10, atol=1e-12)


def test_first_order_prediction_is_the_slope_of_small_steps():
    trained, observed, classifier, weights, module = quick_classifier()
    stage = script("toy_one_step").one_step(classifier, weights, trained, observed, 120, [1e-3])
    for u in (0, 7, 19):
        module.zero_grad()
        nn.functional.cross_entropy(module(trained.images[[u]]), trained.labels[[u]]).backward()
        gradients = [p.grad.clone() for p in module.parameters()]

        def at(shift, gradients=gradients):
            one = copy.deepcopy(module)
            with torch.no_grad():
                for parameter, gradient in zip(one.parameters(), gradients, strict=True):
                    parameter -= shift * gradient
                return one(observed.images).log_softmax(1)

        slope = (at(1e-5) - at(-1e-5)) / 2e-5
        torch.testing.assert_close(stage.per_eta[u], slope, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(stage.measured[1e-3][u], at(1e-3) - at(0.0), rtol=1e-9, atol=1e-12)


def test_remainder_has_slope_two_and_the_change_slope_one(made):
    frame = made("toy_one_step")[0]
    assert len(frame[frame["quantity"] == "slope of remainder"]) == 3
    for quantity, order in (("slope of remainder", 2), ("slope of change of log p", 1)):
        assert np.allclose(frame.loc[frame["quantity"] == quantity, "value"], order, atol=0.03)
    errors = frame[(frame["quantity"] == "remainder") & (frame["step"] == 120)].set_index("eta")["value"]
    assert errors.loc[1e-3] / errors.loc[1e-4] == pytest.approx(100, rel=0.05)


# --- accumulated


def test_account_of_a_run_adds_up_and_its_end_is_that_of_the_run(made):
    toy = script("toy_digits")
    train, held_out = toy.load(0)
    observed = held_out.some_of_each(2)
    classifier = toy.Classifier(0, hidden=16)
    path = [weights for _, weights, _ in toy.sgd(classifier, train, steps=60, learning_rate=0.1, seed=0)]
    moved = classifier.log_probs(path[-1], observed.images) - classifier.log_probs(path[0], observed.images)
    own = moved.gather(1, observed.labels[:, None])[:, 0].view(10, 2).mean(1)
    measured = numbers(made, "toy_accumulated", "b", "measured change of log p").set_index("observed")["value"]
    np.testing.assert_allclose(measured, own.numpy(), rtol=1e-4)
    shares = numbers(made, "toy_accumulated", "b", "share of change of log p").groupby("observed")["value"].sum()
    remainder = numbers(made, "toy_accumulated", "b", "remainder").set_index("observed")["value"]
    np.testing.assert_allclose(shares + remainder, measured, rtol=1e-3, atol=1e-4)
    assert remainder.abs().max() < 0.01 * measured.abs().max()


def test_share_of_a_digit_is_the_slope_along_its_part_of_the_step():
    trained, observed, classifier, weights, _ = quick_classifier()
    toy = script("toy_accumulated")
    batch = script("toy_digits").Digits(trained.images[::3], trained.labels[::3])
    parts = toy.split_step(classifier, weights, batch)
    shares = classifier.change_along(weights, parts, observed.images)
    whole = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    loss = nn.functional.cross_entropy(classifier.logits(whole, batch.images), batch.labels)
    for name, gradient in zip(whole, torch.autograd.grad(loss, list(whole.values())), strict=True):
        torch.testing.assert_close(parts[name].sum(0), -0.1 * gradient, rtol=1e-10, atol=1e-14)
    for digit in (0, 4, 9):
        ends = [
            classifier.log_probs({n: w + sign * 1e-3 * parts[n][digit] for n, w in weights.items()}, observed.images)
            for sign in (1, -1)
        ]
        torch.testing.assert_close(shares[digit], (ends[0] - ends[1]) / 2e-3, rtol=1e-5, atol=1e-9)


def test_zigzag_is_a_path_by_the_true_digit_that_ends_at_the_given_label():
    paths = pd.DataFrame({
        "step": [0, 1, 2] * 3,
        "example": [0] * 3 + [1] * 3 + [2] * 3,
        "p_true": [0.1, 0.8, 0.1, 0.1, 0.4, 0.1, 0.1, 0.8, 0.7],
        "p_given": [0.1, 0.1, 0.8, 0.1, 0.3, 0.9, 0.1, 0.1, 0.2],
    })  # fmt: skip
    assert script("toy_accumulated").zigzags(paths).tolist() == [True, False, False]


# --- squeezing


def test_negative_step_is_gradient_ascent_of_a_logistic_regression():
    soft = script("toy_softmax")
    setting = soft.with_label(soft.rest(5, 1.0), 0.03)
    feature = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    squared = feature.square().sum()
    weight = nn.Parameter(setting.logp[:, None] * feature / squared)  # W phi = z
    optimizer = torch.optim.SGD([weight], lr=0.7, maximize=True)
    nn.functional.cross_entropy((weight @ feature)[None], torch.tensor([setting.label])).backward()
    optimizer.step()
    ours = soft.negative_step(setting.logp, setting.label, 0.7 * float(squared))
    torch.testing.assert_close(ours, (weight @ feature).log_softmax(0).detach(), rtol=1e-10, atol=1e-12)


def test_repeated_steps_are_those_of_an_optimizer_with_momentum():
    soft = script("toy_softmax")
    setting = soft.with_label(soft.rest(1, 2.0), 0.1)
    z = nn.Parameter(setting.logp.clone())
    optimizer = torch.optim.SGD([z], lr=0.5, momentum=0.9, maximize=True)
    path = soft.repeated(setting, 0.5, 20, momentum=0.9)
    for step in range(21):
        torch.testing.assert_close(path[step], z.detach().log_softmax(0), rtol=1e-9, atol=1e-9)
        optimizer.zero_grad()
        nn.functional.cross_entropy(z[None], torch.tensor([setting.label])).backward()
        optimizer.step()


def test_risers_by_threshold_are_those_counted_after_the_step(made):
    by_threshold = numbers(made, "toy_squeezing", "risers", "risers by threshold")["value"].to_numpy()
    counted = numbers(made, "toy_squeezing", "risers", "risers counted")["value"].to_numpy()
    assert len(counted) == 4 * 21
    assert (by_threshold == counted).all()
    assert counted.max() == 49
    assert counted.min() == 1


@pytest.mark.parametrize("panel", ["flat", "peaky", "valley"])
def test_statistics_of_a_step_are_those_of_its_outcome(made, panel):
    before, after = (numbers(made, "toy_squeezing", panel, q)["value"].to_numpy() for q in ("p before", "p after"))
    frame = made("toy_squeezing")[0]
    stats = frame[(frame["panel"] == panel) & frame["token"].isna()].set_index("quantity")["value"]
    star = 1 + before[1:].argmax()  # token 0 is the label
    assert after[0] < before[0]
    assert stats["other_id"] == star
    assert stats["moved_to_other"] == pytest.approx(after[star] - before[star], rel=1e-4, abs=1e-6)
    assert stats["riser_count"] == (after > before).sum()
    assert stats["riser_mass"] == pytest.approx(before[after > before].sum(), rel=1e-4)
    others = np.arange(50) > 0
    assert ((before > stats["tau"]) == (after > before))[others].all()


def test_mass_moved_into_the_peak_is_that_of_the_step_itself(made):
    soft = script("toy_softmax")
    frame = numbers(made, "toy_squeezing_trends", "a, b", "moved into y*")
    for name, temperature in soft.TEMPERATURES.items():
        rows = frame[frame["q"] == name]
        q = soft.rest(0, temperature)
        for share, value in zip(rows["p(y)"], rows["value"], strict=True):
            p = torch.cat([torch.tensor([share], dtype=torch.float64), (1 - share) * q])
            y = torch.nn.functional.one_hot(torch.tensor(0), 50)
            after = (p.log() + 1.0 * (p - y)).softmax(0)
            assert value == pytest.approx(float(after[1] - p[1]), rel=2e-4, abs=1e-8)


def test_less_likely_labels_do_not_move_more_into_the_peak(made):
    for name in ("flat", "mild", "peaky"):
        frame = numbers(made, "toy_squeezing_trends", "a, b", "moved into y*")
        small = frame[(frame["q"] == name) & (frame["p(y)"] < 0.2)].sort_values("p(y)")
        assert (small["value"].diff().dropna() > 0).all()
    often = numbers(made, "toy_squeezing_trends", "how often", "p(y*) rises")
    assert often["value"].tolist() == [1.0]
    for quantity, value in (
        ("p(y) falls", 1.0),
        ("log p of a likelier token rises more", 1.0),
        ("smaller p(y): odds y* : others rise more", 1.0),
        ("smaller p(y), below 0.2: more moves into y*", 0.0),
        ("another y, less likely: y* rises more", 0.0),
        ("another y, less likely: all other tokens end lower", 1.0),
    ):
        assert numbers(made, "toy_squeezing_trends", "how often", quantity)["value"].tolist() == [value]
    rarely = numbers(made, "toy_squeezing_trends", "how often", "smaller p(y): more moves into y*")
    assert rarely["value"].item() < 0.05


def test_a_peakier_context_can_have_more_risers():
    example = pd.DataFrame(script("toy_squeezing_statements").counterexample())
    table = example.pivot(index="quantity", columns="q", values="value")
    assert table.loc["collision", "peakier"] > table.loc["collision", "flatter"]
    assert table.loc["entropy", "peakier"] < table.loc["entropy", "flatter"]
    assert table.loc["risers", "peakier"] > table.loc["risers", "flatter"]
    assert (table.loc["risers"] == table.loc["risers counted"]).all()


def test_repeated_steps_end_with_all_mass_on_the_peak_sooner_with_momentum(made):
    ends = numbers(made, "toy_squeezing_trends", "e", "p(y*)").sort_values("step")
    assert (ends.groupby(["q", "momentum"])["value"].last() > 0.999).all()
    steps = numbers(made, "toy_squeezing_trends", "f", "steps until p(y*) > 0.9")
    table = steps.pivot_table(index=["q", "p(y)"], columns="momentum", values="value")
    assert (table > 0).all().all()
    assert (table[0.9] <= table[0.0]).all()


# --- appendix C


@pytest.fixture(scope="module")
def snapshot():
    module = script("kernel_snapshot")
    runs = script("kernel_runs")
    model, spare = (build_tiny_model(64, hidden_size=16, layers=1).double() for _ in range(2))
    draw = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(0)).tolist()
    responses = [runs.Shortened(draw[0][:4], row[4:]) for row in draw]
    trains = responses[:2]
    found = module.measure(model, spare, trains, responses, stage="sft", step=0, step_size=1e-4, draws=64)
    return found, model, trains, responses


def response_log_probs(model, response):
    ids = torch.tensor([response.prompt_ids + response.response_ids])
    start = len(response.prompt_ids)
    return model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1), ids[0, start:]


def nll(model, response):
    logp, labels = response_log_probs(model, response)
    return -logp.gather(1, labels[:, None]).sum()


def test_snapshot_holds_what_a_plain_step_does(snapshot):
    found, model, trains, responses = snapshot
    for u, trained in enumerate(trains):
        after = copy.deepcopy(model)
        optimizer = torch.optim.SGD(after.parameters(), lr=1e-4)
        nll(after, trained).backward()
        optimizer.step()
        with torch.no_grad():
            trained_logp, labels = response_log_probs(model, trained)
            residual = nn.functional.one_hot(labels, 64) - trained_logp.exp()
            for o, response in enumerate(responses):
                old, new = (response_log_probs(m, response)[0] for m in (model, after))
                moved = nll(model, response) - nll(after, response)
                torch.testing.assert_close(found.moved[o, u], moved, rtol=1e-4, atol=1e-10)
                torch.testing.assert_close(found.sign_delta[o, u], (new - old).mean(), rtol=1e-4, atol=1e-10)
                projections = [torch.eye(64) - p for p in old.exp()]  # A = I - 1 pi^T
                sizes = sum(a.square().sum() for a in projections) * residual.square().sum()
                bound = ((new - old).square().sum() / sizes).sqrt() / 1e-4
                torch.testing.assert_close(found.lbk[o, u], bound, rtol=1e-4, atol=0)
                whole = ((new - old).square().sum() / len(trained.response_ids)).sqrt() / 1e-4
                torch.testing.assert_close(found.visible_bound[o, u], whole, rtol=1e-4, atol=0)
                size = float(found.moved.abs().max())
                torch.testing.assert_close(found.predicted[o, u], moved.detach(), rtol=1e-2, atol=1e-2 * size)


def jacobian(model, response, *, of_log_probs):
    """All outputs at all response tokens by all parameters, one backward each."""
    ids = torch.tensor([response.prompt_ids + response.response_ids])
    logits = model(input_ids=ids).logits[0, len(response.prompt_ids) - 1 : -1]
    outputs = logits.log_softmax(-1) if of_log_probs else logits
    rows = [torch.autograd.grad(value, list(model.parameters()), retain_graph=True) for value in outputs.flatten()]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def test_bounds_lie_below_the_norm_of_the_kernel(snapshot):
    found, model, trains, responses = snapshot
    exact = (
        jacobian(model, responses[3], of_log_probs=False) @ jacobian(model, trains[1], of_log_probs=False).T
    ).norm()
    assert float((found.norm[3, 1] - exact).abs()) < 5 * float(found.norm_error[3, 1])
    assert float(found.norm_error[3, 1]) < 0.2 * float(exact)
    slack = 4 * found.norm_error
    assert (found.lbk < found.norm + slack).all()
    assert (found.spectral < found.norm + slack).all()
    assert (found.spectral > found.lbk).all()
    assert (found.visible_bound < found.visible + 4 * found.visible_error).all()


def test_visible_norm_is_that_of_log_probs_met_by_random_signs(snapshot):
    found, model, trains, responses = snapshot
    weights = dict(model.named_parameters())
    norm, error = script("kernel_snapshot").visible_norms(model, [responses[3]], [trains[1]], draws=3, weights=weights)
    generator = torch.Generator().manual_seed(0)
    draws = [(2 * torch.randint(2, (5, 64), generator=generator) - 1).double() for _ in range(3)]
    kernel = jacobian(model, responses[3], of_log_probs=True) @ jacobian(model, trains[1], of_log_probs=True).T
    squares = torch.stack([(kernel @ e.flatten()).square().sum() for e in draws])
    torch.testing.assert_close(norm[0, 0], squares.mean().sqrt(), rtol=1e-4, atol=0)
    torch.testing.assert_close(error[0, 0], squares.std() / 3**0.5 / (2 * norm[0, 0]), rtol=1e-3, atol=0)
    assert float((found.visible[3, 1] - kernel.norm()).abs()) < 5 * float(found.visible_error[3, 1])


def test_comparison_with_itself_is_no_change(snapshot):
    found = snapshot[0]
    told = script("kernel_snapshot").compare(found, found)
    assert told["relative change of T"] == 0
    assert told["relative change of last layer, whole responses"] == 0
    assert told["relative stability of ||K||, u = 0"] == pytest.approx(1)
    assert told["explained share of the plain steps"] > 0.999


def test_whole_responses_of_the_kernel_are_products_of_whole_gradients(snapshot):
    found, model, trains, responses = snapshot
    sums = found.of_responses(found.exact.values)

    def gradient(response):
        grads = torch.autograd.grad(nll(model, response), list(model.parameters()))
        return torch.cat([g.flatten() for g in grads])

    for o in range(4):
        for u in range(2):
            expected = gradient(responses[o]) @ gradient(trains[u])
            torch.testing.assert_close(sums[o, u], expected, rtol=1e-5, atol=1e-6)


def test_appendix_c_tells_every_moment_of_both_runs(made):
    frame = made("appendix_c")[0]
    assert frame.groupby("stage")["step"].unique().map(sorted).to_dict() == {"sft": [0, 2], "dpo": [2]}
    whole = frame[frame["observed"].isna()]
    start = whole[whole["total"] == 0].set_index("quantity")["value"]
    later = whole[whole["total"] > 0].set_index("quantity")["value"]
    assert start["relative change of T"] == 0
    assert (later["relative change of T"] > 0.01).all()
    assert (whole[whole["quantity"] == "explained share of the plain steps"]["value"] > 0.99).all()
    pairs = frame[frame["trained"].notna()].pivot_table(
        index=["total", "trained", "observed"], columns="quantity", values="value"
    )
    assert len(pairs) == 3 * 2 * 3
    assert (pairs["sqrt(LBK) / eta"] < pairs["||K||"] + 4 * pairs["standard error of ||K||"]).all()
