"""The exact token kernel against its slow twin: one backward per token, flat gradients, float64."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from trl.trainer.utils import add_fused_lm_head

from llm_dynamics.kernel import predict_from_kernel, token_kernel
from llm_dynamics.kernel.plan import Sizes, make_plan
from llm_dynamics.kernel.rows import select_rows
from llm_dynamics.likelihood import split_model
from tests.kernel.brute_force import brute_force, in_float64, jacobian, trainable
from tests.likelihood.models import ARCHITECTURES, VOCAB, build

EXACT = 1e-9
TESTED = [
    "llama_tied", "llama_untied", "qwen2_biases", "qwen3_qk_norm", "gpt2_conv1d", "gemma2_soft_capped",
    "cohere_logit_scale", "pythia", "dynamic_rope", "mamba_no_attention",
]  # fmt: skip


def response(seed, prompt, length):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randint(3, VOCAB, (prompt + length,), generator=generator).tolist()
    return SimpleNamespace(prompt_ids=draw[:prompt], response_ids=draw[prompt:])


TRAIN = [response(1, 5, 6), response(2, 1, 3), response(3, 9, 4)]
PROBES = [response(4, 4, 5), response(5, 7, 1), TRAIN[0]]
LENGTHS = [6, 3, 4]


def assert_same(values, expected):
    scale = expected.abs().max()
    assert scale > 0
    assert values.shape == expected.shape
    assert (values - expected).abs().max() <= EXACT * scale


@pytest.fixture(autouse=True)
def _float64():
    with in_float64():
        yield


@pytest.fixture(scope="module")
def tied():
    return build("llama_tied", dtype=torch.float64)


@pytest.fixture(scope="module")
def expected(tied):
    with in_float64():
        return brute_force(tied, TRAIN, PROBES)


def lora(**changes):
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(build("llama_untied"), LoraConfig(**options | changes)).to(torch.float64).eval()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # B starts at zero, which would hide A
            parameter.data.normal_(generator=generator).mul_(0.2)
    return model


@pytest.mark.parametrize("name", TESTED)
def test_every_architecture_equals_one_backward_per_token(name):
    model = build(name, dtype=torch.float64)
    kernel = token_kernel(model, TRAIN, PROBES)
    assert_same(kernel.values, brute_force(model, TRAIN, PROBES))


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_padding_does_not_matter(tied, padding_side):
    padded = brute_force(tied, TRAIN, PROBES, pad_to=16, padding_side=padding_side)
    assert_same(token_kernel(tied, TRAIN, PROBES).values, padded)


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_dora": True}, {"target_modules": ["q_proj", "embed_tokens"]}, {"target_modules": ["v_proj", "lm_head"]}],
    ids=["lora", "dora", "on_embedding", "on_head"],
)
def test_adapters_equal_one_backward_per_token(changes):
    model = lora(**changes)
    kernel = token_kernel(model, TRAIN, PROBES)
    assert all("lora_" in name for name in kernel.parameters)
    assert_same(kernel.values, brute_force(model, TRAIN, PROBES))


def test_a_fully_trained_module_beside_adapters_counts():
    model = lora(modules_to_save=["lm_head"], target_modules=["q_proj"])
    assert_same(token_kernel(model, TRAIN, PROBES).values, brute_force(model, TRAIN, PROBES))


def test_merged_adapters_are_refused():
    model = lora()
    model.merge_adapter()
    with pytest.raises(ValueError, match="none of the chosen parameters reaches"):
        token_kernel(model, TRAIN, PROBES)


def test_fused_head_of_trl_changes_nothing(expected):
    model = build("llama_tied", dtype=torch.float64)
    add_fused_lm_head(model)
    assert_same(token_kernel(model, TRAIN, PROBES).values, expected)


@pytest.mark.parametrize("contraction", ["gram", "materialise", "auto"])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2_conv1d"])
def test_contractions_agree(name, contraction):
    model = build(name, dtype=torch.float64)
    kernel = token_kernel(model, TRAIN, PROBES, contraction=contraction)
    assert_same(kernel.values, brute_force(model, TRAIN, PROBES))


def test_one_side_materialised_agrees(tied):
    # few long rows against many: the counts choose to form the gradients of the few
    train = [response(11, 40, 20)]
    probes = [response(12, 40, 20)]
    kernel = token_kernel(tied, train, probes, train_rows="responses")
    assert_same(kernel.values, brute_force(tied, train, probes).sum(1, keepdim=True))


@pytest.mark.parametrize("memory_budget_mb", [0.5, 0.7, 1, 3])
@pytest.mark.parametrize("probes", [PROBES, PROBES * 3], ids=["few_probes", "many_probes"])
def test_memory_budget_does_not_matter(tied, expected, memory_budget_mb, probes):
    kernel = token_kernel(tied, TRAIN, probes, memory_budget_mb=memory_budget_mb)
    assert_same(kernel.values, expected.repeat(len(probes) // len(PROBES), 1))


def test_small_budgets_make_several_blocks():
    sources, _ = select_rows([response(seed, 5, 60) for seed in range(9)], "tokens", VOCAB, side="train")
    sizes = Sizes({"w": (32, 48, 1)}, 32, 0, 48, 4, 8, "cpu")
    small, large = (
        make_plan(sources, sources, sizes, budget=budget, contraction="gram", truncate=True)
        for budget in (2**23, 2**30)
    )
    assert len(small.blocks) > 1 == len(large.blocks)
    assert small.rows > large.rows


def test_a_budget_below_one_row_is_refused(tied):
    with pytest.raises(ValueError, match=r"memory_budget_mb=0\.01 leaves .* one row of 10 tokens"):
        token_kernel(tied, TRAIN, PROBES, memory_budget_mb=0.01)


def test_whole_responses_and_spans_are_sums_of_tokens(tied, expected):
    spans = [[(0, 2), (1, 6)], [], [(3, 4)]]
    kernel = token_kernel(tied, TRAIN, PROBES, train_rows=spans, probe_rows="responses")
    columns = torch.stack([expected[:, 0:2].sum(1), expected[:, 1:6].sum(1), expected[:, 12]], dim=1)
    rows = torch.stack([columns[:5].sum(0), columns[5], columns[6:].sum(0)])
    assert_same(kernel.values, rows)
    assert kernel.train.response.tolist() == [0, 0, 2]
    assert kernel.train.start.tolist() == [0, 1, 3]
    assert kernel.sums().shape == (3, 3)
    assert (kernel.sums()[:, 1] == 0).all()
    with pytest.raises(IndexError, match="no row of response 1"):
        kernel.block(0, 1)


@pytest.mark.parametrize("train_rows", ["tokens", "responses"])
def test_residual_columns_are_weighted_by_the_coefficients(tied, expected, train_rows):
    c = torch.linspace(-1, 2, 13)
    kernel = token_kernel(tied, TRAIN, PROBES, kind="residual", coefficients=c, train_rows=train_rows)
    weighted = expected * c
    if train_rows == "responses":
        weighted = torch.stack([part.sum(1) for part in weighted.split(LENGTHS, dim=1)], dim=1)
    assert_same(kernel.values, weighted)
    assert_same(predict_from_kernel(kernel, 0.1), -0.1 * expected @ c.double())


def test_blocks_frames_and_sums(tied, expected):
    kernel = token_kernel(tied, TRAIN, PROBES)
    assert_same(kernel.block(2, 1), expected[6:12, 6:9])
    frame = kernel.frame(probe=2, train=1)
    assert frame.shape == (6, 3)
    assert frame.loc[(2, 4, 5), (1, 2, 3)] == kernel.block(2, 1)[4, 2]
    assert kernel.frame().shape == (12, 13)
    assert_same(kernel.sums()[2, 1], expected[6:12, 6:9].sum())


@pytest.mark.parametrize(
    "choice",
    [
        ["model.embed_tokens.weight"],
        ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight"],
        lambda name, _: "mlp" in name,
    ],
    ids=["tied_matrix", "names", "predicate"],
)
def test_subsets_of_parameters(tied, choice):
    names = [n for n, p in tied.named_parameters() if (choice(n, p) if callable(choice) else n in choice)]
    kernel = token_kernel(tied, TRAIN, PROBES, parameters=choice)
    assert kernel.parameters == tuple(names)
    assert_same(kernel.values, brute_force(tied, TRAIN, PROBES, names))


def test_the_head_alone_needs_no_backward():
    model = build("qwen2_biases", dtype=torch.float64)
    seen = []
    kernel = token_kernel(model, TRAIN, PROBES, parameters=["lm_head.weight"], on_progress=lambda *p: seen.append(p))
    assert_same(kernel.values, brute_force(model, TRAIN, PROBES, ["lm_head.weight"]))
    assert not seen


def test_frozen_parameters_are_left_out_or_named():
    model = build("llama_untied", dtype=torch.float64)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.0" in name)
    assert_same(token_kernel(model, TRAIN, PROBES).values, brute_force(model, TRAIN, PROBES, trainable(model)))
    named = token_kernel(model, TRAIN, PROBES, parameters=["lm_head.weight"])
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trainable(model)
    model.requires_grad_(True)
    assert_same(named.values, brute_force(model, TRAIN, PROBES, ["lm_head.weight"]))


def test_a_weight_read_past_its_module_is_materialised():
    model = build("llama_tied", dtype=torch.float64)
    mlp = model.model.layers[0].mlp
    gate = mlp.gate_proj

    class ReadsWeights(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = gate, mlp.up_proj, mlp.down_proj

        def forward(self, x):
            twice = nn.functional.linear(x, self.gate_proj.weight) + self.gate_proj(2 * x)
            return self.down_proj(torch.tanh(twice) * self.up_proj(x))

    model.model.layers[0].mlp = ReadsWeights()
    assert_same(token_kernel(model, TRAIN, PROBES).values, brute_force(model, TRAIN, PROBES))


def test_an_input_changed_in_place_is_refused():
    model = build("llama_tied", dtype=torch.float64)
    down = model.model.layers[0].mlp.down_proj

    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = down

        def forward(self, x):
            x = x + 0.0
            y = self.lin(x) * 1.0
            with torch.no_grad():
                x.mul_(2.0)
            return y

    model.model.layers[0].mlp.down_proj = Overwrites()
    with pytest.raises(NotImplementedError, match="changed in place after the call"):
        token_kernel(model, TRAIN, PROBES, parameters=["model.layers.0.mlp.down_proj.lin.weight"])


def test_a_tied_matrix_read_past_its_module_is_refused():
    model = build("llama_tied", dtype=torch.float64)
    table = model.model.embed_tokens
    model.model.norm.register_forward_hook(lambda module, args, output: output + table.weight[:1])
    with pytest.raises(NotImplementedError, match=r"embed_tokens\.weight is tied to the LM head and read by code"):
        token_kernel(model, TRAIN, PROBES)


def test_a_module_called_twice_counts_with_cross_terms():
    model = build("llama_tied", dtype=torch.float64)
    model.model.layers[1] = model.model.layers[0]
    assert_same(token_kernel(model, TRAIN, PROBES).values, brute_force(model, TRAIN, PROBES))


class Scaled(nn.Embedding):
    embed_scale = 3.0

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


class Squared(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) ** 2


@pytest.mark.parametrize("kind", [Scaled, Squared])
@pytest.mark.parametrize("architecture", ["llama_tied", "llama_untied"])
def test_embeddings_that_do_more_than_look_up(kind, architecture):
    model = build(architecture, dtype=torch.float64)
    model.model.embed_tokens.__class__ = kind
    assert_same(token_kernel(model, TRAIN, PROBES).values, brute_force(model, TRAIN, PROBES))


def test_operations_without_batched_backward_are_taken_row_by_row():
    class Unbatched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            if torch._C._functorch.is_batchedtensor(g):
                raise RuntimeError("no rule")
            return 2 * x * g

    model = build("llama_tied", dtype=torch.float64)
    model.model.norm.register_forward_hook(lambda module, args, output: Unbatched.apply(output))
    assert_same(token_kernel(model, TRAIN, PROBES).values, brute_force(model, TRAIN, PROBES))


def test_a_model_that_looks_ahead_is_refused_and_where_that_is_seen_late_not_cut():
    model = build("llama_tied", dtype=torch.float64)
    split = split_model(model)  # as of a model that begins to look ahead after it was split
    model.model.norm.register_forward_hook(lambda module, args, output: output + output.mean(1, keepdim=True))
    with pytest.raises(NotImplementedError, match="is no causal model as it is set up"):
        token_kernel(model, TRAIN, PROBES)
    assert_same(token_kernel(model, TRAIN, PROBES, split=split).values, brute_force(model, TRAIN, PROBES))


def test_mixture_of_experts():
    model = build("mixtral_moe")  # its grouped products know no float64
    expected = brute_force(model, TRAIN[:2], PROBES[:2])
    kernel = token_kernel(model, TRAIN[:2], PROBES[:2])
    torch.testing.assert_close(kernel.values, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_bfloat16_weights_give_float32_near_the_exact_kernel(expected):
    model = build("llama_tied", dtype=torch.bfloat16)
    values = token_kernel(model, TRAIN, PROBES).values
    assert values.dtype == torch.float32
    assert torch.corrcoef(torch.stack([values.flatten().double(), expected.flatten()]))[0, 1] > 0.99


def fingerprint(model):
    modules = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    grads = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    return modules, grads, model.config.use_cache, model.config._attn_implementation, torch.get_rng_state()


def assert_untouched(before, after):
    assert before[0] == after[0]
    assert before[2:4] == after[2:4]
    assert torch.equal(before[4], after[4])
    for (flag, grad), (flag_after, grad_after) in zip(before[1], after[1], strict=True):
        assert flag == flag_after
        assert grad is grad_after is None or torch.equal(grad, grad_after)


@pytest.mark.parametrize("fails", [False, True])
def test_everything_touched_is_restored(fails):
    model = build("llama_tied", dtype=torch.float64)
    model.train()
    model.model.layers[0].eval()
    model.model.layers[1].mlp.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    before = fingerprint(model)

    def on_progress(done, total):
        torch.rand(1)
        if fails and done > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) if fails else in_float64():
        token_kernel(model, TRAIN, PROBES, on_progress=on_progress, parameters=lambda name, _: "mlp" in name)
    assert_untouched(before, fingerprint(model))


@pytest.mark.parametrize(("probes", "rows"), [(PROBES[:2], 19), (TRAIN, 26)], ids=["others", "itself"])
def test_progress_ends_at_its_total(tied, probes, rows):
    seen = []
    token_kernel(tied, TRAIN, probes, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (rows, rows)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_dropout_is_off_and_autocast_is_ignored(tied, expected):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(token_kernel(tied, TRAIN, PROBES, split=split_model(tied)).values, expected)


def sgd_change(model, responses, coefficients, probe, learning_rate):
    """The measured change of the probe's log-probs by one SGD step on sum_l c_l log pi(y_l)."""
    names = trainable(model)
    gradient = (coefficients[:, None] * jacobian(model, responses, names)).sum(0)

    def logps():
        ids = torch.tensor([[*probe.prompt_ids, *probe.response_ids]])
        logp = model(input_ids=ids).logits[0].log_softmax(-1)[len(probe.prompt_ids) - 1 : -1]
        return logp.gather(1, torch.tensor(probe.response_ids)[:, None])[:, 0]

    with torch.no_grad():
        before = logps()
        parameters = list(model.parameters())
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(parameters) - learning_rate * gradient, parameters)
        return logps() - before


def test_the_prediction_of_a_real_step_is_off_by_the_square_of_its_size():
    c = torch.linspace(-1, 1, 6, dtype=torch.float64)
    kernel = token_kernel(build("llama_tied", dtype=torch.float64), TRAIN[:1], PROBES[:1])
    errors = []
    for eta in (1e-5, 1e-6):
        change = sgd_change(build("llama_tied", dtype=torch.float64), TRAIN[:1], c, PROBES[0], eta)
        predicted = predict_from_kernel(kernel, eta, [c])
        assert (change - predicted).norm() < 0.05 * change.norm()
        errors.append((change - predicted).norm())
    assert 1.9 < torch.log10(errors[0] / errors[1]) < 2.1


@given(seed=st.integers(0, 1000), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3), whole=st.booleans())
@settings(max_examples=12, deadline=None)
def test_the_kernel_is_symmetric_and_positive(tied, seed, lengths, whole):
    a = [response(seed + i, 1 + i, length) for i, length in enumerate(lengths)]
    b = [response(seed + 100, 3, 4)]
    rows = "responses" if whole else "tokens"
    with in_float64():
        forth = token_kernel(tied, a, b, train_rows=rows).values
        back = token_kernel(tied, b, a, probe_rows=rows).values
        own = token_kernel(tied, a, a, train_rows=rows, probe_rows=rows).values
    assert_same(forth, back.T)
    assert_same(own, own.T)
    assert torch.linalg.eigvalsh(own).min() >= -EXACT * own.abs().max()


NO_IDS = SimpleNamespace(prompt_ids=[], response_ids=[3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": []}, "train is empty"),
        ({"probes": [NO_IDS]}, r"probes\[0\] has 0 prompt"),
        ({"probes": [SimpleNamespace(prompt_ids=[1], response_ids=[VOCAB])]}, "outside the model's vocabulary of 101"),
        ({"train_rows": "lines"}, "train_rows is 'lines'"),
        ({"train_rows": [[(0, 1)]]}, "spans for 1 responses"),
        ({"probe_rows": [[(0, 9)], [], []]}, r"span \(0, 9\).*<= 5"),
        ({"probe_rows": [[], [], []]}, "no span at all"),
        ({"kind": "logits"}, "kind is 'logits'"),
        ({"kind": "residual"}, "coefficients belong to"),
        ({"coefficients": torch.ones(13)}, "coefficients belong to"),
        ({"kind": "residual", "coefficients": torch.ones(5)}, r"needed: \(13,\)"),
        ({"kind": "residual", "coefficients": [[1.0]] * 3}, "one per response"),
        ({"contraction": "fast"}, "contraction is 'fast'"),
        ({"memory_budget_mb": 0}, "must be positive"),
        ({"parameters": ["lm_haed.weight"]}, r"no parameters are named \['lm_haed.weight'\]"),
        ({"parameters": "lm_head.weight"}, "give a list"),
        ({"parameters": []}, "no parameters are chosen"),
    ],
)
def test_input_that_makes_no_sense_is_refused(tied, changes, message):
    arguments = {"train": TRAIN, "probes": PROBES} | changes
    with pytest.raises(ValueError, match=message):
        token_kernel(tied, arguments.pop("train"), arguments.pop("probes"), **arguments)


def test_quantised_and_absent_weights_are_refused(tied):
    model = build("llama_tied")
    model.model.layers[0].mlp.extra = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(NotImplementedError, match=r"mlp\.extra is torch\.int8, a quantised weight"):
        token_kernel(model, TRAIN, PROBES, parameters=["model.layers.0.mlp.extra"])
    model.model.layers[0].mlp.extra = nn.Parameter(torch.ones(2, device="meta"))
    with pytest.raises(NotImplementedError, match="meta device"):
        token_kernel(model, TRAIN, PROBES, parameters=["model.layers.0.mlp.extra"])


def test_predictions_need_coefficients_once(tied):
    label = token_kernel(tied, TRAIN[1:2], PROBES[1:2])
    with pytest.raises(ValueError, match="needs coefficients"):
        predict_from_kernel(label, 0.1)
    residual = token_kernel(tied, TRAIN[1:2], PROBES[1:2], kind="residual", coefficients=torch.ones(3))
    with pytest.raises(ValueError, match="part of a kernel"):
        predict_from_kernel(residual, 0.1, torch.ones(3))


def test_all_tested_architectures_exist():
    assert set(TESTED) <= set(ARCHITECTURES)
