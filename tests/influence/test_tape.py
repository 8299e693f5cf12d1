"""The tape: what it sees, what it leaves alone, and what it lets go of."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback
from trl.trainer.utils import add_fused_lm_head

from llm_dynamics.influence import BeforeStep, LossTape, by_example, by_sign, split_update
from tests.influence.steps import StepRecorder, relative_gap, run_steps, total, train
from tests.likelihood.models import VOCAB, build, without_float32_casts
from tests.training import build_trainer, own_rows, save_tiny_model, weights_of

DROPOUT = 0.2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def dropout_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("dropout_model"), dropout=DROPOUT)


@pytest.fixture
def model():
    return build("llama_tied", dtype=torch.float64).train()


@pytest.fixture
def ids():
    return torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def loss_with_both_signs(logits, ids):
    """A loss of the label log-probs of one row upwards and another downwards; the third row has none."""
    losses = cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").sum(dim=1)
    return losses[0] / 3 - losses[1] / 7


# ---- what is recorded ------------------------------------------------------------------------------------------------


def test_coefficients_and_parts_of_a_loss_on_logits_are_exact_in_float64(model, ids):
    with without_float32_casts(), LossTape(model, by_sign) as tape:
        loss_with_both_signs(model(input_ids=ids).logits, ids).backward()
    (batch,) = tape.batches
    expected = torch.tensor([[-1 / 3], [1 / 7], [0]], dtype=torch.float64).expand(3, 8)
    torch.testing.assert_close(batch.c, expected, rtol=1e-10, atol=1e-15)
    assert torch.equal(batch.has_loss, expected != 0)
    assert relative_gap(total(tape.parts), gradients(model)) <= 1e-12


def test_parts_are_the_gradients_of_each_labels_own_loss(model, ids):
    with without_float32_casts():
        with LossTape(model, by_sign) as tape:
            loss_with_both_signs(model(input_ids=ids).logits, ids).backward()
        for label, row, c in (("up", 0, -1 / 3), ("down", 1, 1 / 7)):
            model.zero_grad()
            logp = model(input_ids=ids[row : row + 1]).logits[:, :-1].log_softmax(-1)
            (c * logp.gather(2, ids[row : row + 1, 1:, None]).sum()).backward()
            assert relative_gap(tape.parts[label], gradients(model)) <= 1e-12


def test_forwards_without_a_gradient_and_without_a_backward_are_not_recorded(model, ids):
    with LossTape(model, by_sign) as tape:
        with torch.no_grad():
            model(input_ids=ids)
        model(input_ids=ids)
        model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert tape.batches == []
    with pytest.raises(RuntimeError, match=r"no loss was seen.*LlamaForCausalLM"):
        tape.raise_if_empty()


def test_the_reference_and_evaluation_of_real_trainers_are_not_recorded(folder, tmp_path):
    for kind, options in (("dpo", {}), ("dpo", {"lora": True}), ("grpo", {"beta": 0.1})):
        recorder = run_steps(kind, folder, tmp_path / kind, gradient_accumulation_steps=3, double=False, **options)
        assert [len(step.tape.batches) for step in recorder.steps] == [3]


def test_several_forwards_before_one_backward_are_all_recorded(model, ids):
    with LossTape(model, by_sign) as tape:
        losses = [loss_with_both_signs(model(input_ids=some).logits, some) for some in (ids, ids.flip(1))]
        sum(losses).backward()
    assert len(tape.batches) == 2
    assert relative_gap(total(tape.parts), gradients(model)) <= 1e-6
    # in the order of their backward passes, and numbered on
    assert sorted(int(batch.example.min()) for batch in tape.batches) == [0, 3]


def test_two_backward_passes_of_one_forward_are_both_recorded(model, ids):
    with LossTape(model, by_sign) as tape:
        loss = loss_with_both_signs(model(input_ids=ids).logits, ids)
        loss.backward(retain_graph=True)
        loss.backward()
    assert len(tape.batches) == 2
    assert relative_gap(total(tape.parts), gradients(model)) <= 1e-6


def test_ids_given_by_position_are_kept_for_a_replay(model, ids):
    with LossTape(model) as tape:
        loss_with_both_signs(model(ids).logits, ids).backward()
    assert torch.equal(tape.batches[0].inputs["input_ids"], ids)
    assert tape.parts == {}


def test_examples_are_numbered_over_the_global_step(folder, tmp_path):
    step = run_steps("sft", folder, tmp_path, gradient_accumulation_steps=3, double=False).steps[0]
    rows = [batch.example[:, 0].tolist() for batch in step.tape.batches]
    assert rows == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    "layout",
    [{"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}],
    ids=["packed", "padding_free"],
)
def test_sequences_of_a_packed_row_are_told_apart(layout, folder, tmp_path):
    step = run_steps("sft", folder, tmp_path, labelling=by_example, gradient_accumulation_steps=2, **layout).steps[0]
    assert relative_gap(total(step.parts), step.gradient_of_loss()) <= 1e-10
    seen = []
    for batch in step.tape.batches:
        assert len(batch.labels) == 1
        ends = batch.example.diff(dim=1).nonzero()[:, 1] + 1
        starts = (batch.inputs["position_ids"] == 0).nonzero()[1:, 1]  # of all but the first sequence
        assert (ends + 1).tolist() == starts.tolist()
        assert len(starts) >= 1
        assert (batch.labels[0, ends] == -100).all()  # nobody predicts the first token of the next sequence
        seen += batch.example.unique().tolist()
    assert seen == list(range(len(seen)))
    assert set(step.parts) == {f"example_{k}" for k in seen}


# ---- real graphs -----------------------------------------------------------------------------------------------------

GRAPHS = {
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "no_checkpointing": {"gradient_checkpointing": False},
    "lora": {"lora": True, "dropout": DROPOUT},
}


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_parts_add_up_under_dropout_checkpointing_and_lora(graph, kind, dropout_folder, tmp_path):
    step = run_steps(kind, dropout_folder, tmp_path, gradient_accumulation_steps=2, **GRAPHS[graph]).steps[0]
    assert relative_gap(total(step.parts), step.gradient_of_loss()) <= 1e-10


# ---- what is left alone ----------------------------------------------------------------------------------------------


class State(TrainerCallback):
    """Keeps `.grad` and the random state before every optimizer step."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        gradients = {n: p.grad.numpy().tobytes() for n, p in model.named_parameters() if p.grad is not None}
        self.seen.append((gradients, torch.get_rng_state().numpy().tobytes()))


@pytest.mark.parametrize(
    ("kind", "graph"),
    [
        ("sft", "checkpointing"),
        ("sft", "lora"),
        ("dpo", "no_checkpointing"),
        ("grpo", "lora"),
        ("plain", "checkpointing"),
    ],
)
def test_a_taped_run_is_bit_for_bit_the_run_alone(kind, graph, dropout_folder, tmp_path):
    runs = []
    for taped in (False, True):
        state = State()
        trainer = build_trainer(
            kind,
            dropout_folder,
            tmp_path / str(taped),
            max_steps=2,
            gradient_accumulation_steps=2,
            callbacks=[state],
            **GRAPHS[graph],
        )
        if taped:
            trainer.add_callback(StepRecorder(trainer))
        train(trainer)
        runs.append((state.seen, own_rows(trainer), weights_of(trainer)))
    assert len(runs[0][0]) == 2
    assert runs[0] == runs[1]


def test_hooks_are_gone_afterwards_also_after_an_error(model, ids):
    before = (dict(model._forward_hooks), dict(model._forward_pre_hooks))

    def fail():
        with LossTape(model, by_sign):
            model(input_ids=ids)
            assert len(model._forward_hooks) == 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (dict(model._forward_hooks), dict(model._forward_pre_hooks)) == before


def test_a_backward_after_the_tape_is_closed_is_not_recorded(model, ids):
    with LossTape(model, by_sign) as tape:
        loss = loss_with_both_signs(model(input_ids=ids).logits, ids)
    loss.backward()
    assert tape.batches == []


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("backward", [True, False])
def test_no_output_outlives_its_step(fused, backward, ids):
    model = build("llama_tied")
    if fused:
        add_fused_lm_head(model)
    outputs = []
    for _ in range(2):
        with LossTape(model, by_sign) as tape:
            output = model(input_ids=ids, labels=ids, **({"fused_lm_head": True} if fused else {}))
            outputs.append(weakref.ref(output.log_probs if fused else output.logits))
            if backward:
                output.loss.backward()
        del output
        assert len(tape.batches) == backward
    gc.collect()
    assert [reference() for reference in outputs] == [None, None]


def test_outputs_of_earlier_micro_batches_are_let_go_within_a_step(ids):
    model = build("llama_tied")
    outputs = []
    with LossTape(model, by_sign):
        for _ in range(3):
            output = model(input_ids=ids, labels=ids)
            outputs.append(weakref.ref(output.logits))
            output.loss.backward()
            del output
        gc.collect()
        assert [reference() is not None for reference in outputs] == [False, False, True]


@pytest.mark.parametrize("frozen", ["up_proj", "norm"])
def test_frozen_parameters_have_no_parts(model, ids, frozen):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    with LossTape(model, by_sign) as tape:
        loss_with_both_signs(model(input_ids=ids).logits, ids).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name for part in tape.parts.values() for name in part} == trained
    assert not any(frozen in name for name in trained)


class Broadcasting(nn.Module):
    """Parameters to which autograd hands one gradient (two that are added) and an expanded one (a sum)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, 4)
        self.first, self.second = (nn.Parameter(torch.randn(VOCAB, 4)) for _ in range(2))
        self.shift = nn.Parameter(torch.randn(3))

    def forward(self, input_ids):
        weight = self.first + self.second
        return SimpleNamespace(logits=(self.embedding(input_ids) + self.shift.sum()) @ weight.T)


def test_parameters_that_share_a_gradient_keep_parts_of_their_own(ids):
    model = Broadcasting().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LossTape(model, by_sign) as tape:
        for some in (ids, ids.flip(1)):
            loss_with_both_signs(model(input_ids=some).logits, some).backward()
    assert relative_gap(total(tape.parts), gradients(model)) <= 1e-12
    before = BeforeStep.of(optimizer, tape.parameters)
    optimizer.step()
    update = split_update(optimizer, tape.parameters, before, tape.parts)
    assert all(part.abs().max() <= 1e-15 for part in update.parts["rounding"].values())
