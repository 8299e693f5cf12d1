"""The experiment on lazy likelihood displacement: one update on one question from the same weights, by each method."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import GRPOTrainer

from llm_dynamics import _trl
from llm_dynamics.kernel.gwhes import gwhes
from llm_dynamics.kernel.last_layer import anchor_products
from llm_dynamics.kernel.output_head import output_head
from llm_dynamics.kernel.residuals import ResidualRule
from llm_dynamics.kernel.token_states import HeadTokens, TokenStates
from llm_dynamics.likelihood import score_logps, split_model
from llm_dynamics.likelihood.preserve import evaluating
from llm_dynamics.rollouts import LossRow, loss_rows
from llm_dynamics.trainers.nthr import NTHRConfig, NTHRGRPOTrainer

ARMS: Mapping[str, Mapping[str, Any]] = {
    "grpo": {"nthr_method": "none"},
    "pos_only": {"nthr_method": "pos_only"},
    "nthr": {"nthr_method": "nthr", "nthr_eta": "0.0"},
    "random": {"nthr_method": "random", "nthr_eta": "0.0"},
}
"""The arms of [NTHR]'s experiment, as fields of `NTHRConfig`."""
BASELINE = "grpo"
TAKEN_OVER = ("num_generations", "max_completion_length", "temperature")
"""What is taken over from the configuration of a trainer that is measured."""


@dataclass(frozen=True)
class _Question:
    """A mixed question and what the model answered."""

    index: int
    row: Mapping[str, Any]
    rows: list[LossRow]
    rewards: Tensor
    gwhes: float
    before: Tensor


@dataclass
class _Study:
    """What the arms share."""

    wanted: int
    correct_from: float
    temperature: float
    questions: list[_Question] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    on_progress: Callable[[str, int, int], None] | None = None


def measure_lld(
    source: nn.Module | GRPOTrainer,
    questions: Sequence[Mapping[str, Any]],
    *,
    reward_funcs: Any = None,
    processing_class: Any = None,
    arms: Mapping[str, Mapping[str, Any]] = ARMS,
    n_questions: int = 20,
    correct_from: float = 0.5,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Measure Delta(x), what one update on a question does to its own correct responses, under several methods.

        Delta(x) = mean over correct responses y+ of [log pi'(y+|x) - log pi(y+|x)],   nats, summed over tokens

    The protocol of [NTHR] (Deng et al., arXiv 2505.18830, Section 3): for each question the model's weights are put
    back, the optimizer is fresh, G responses are sampled, and one step is taken; questions without both correct and
    wrong responses are passed over. All arms see the same responses, which are those that the GRPO arm sampled. Every
    step is that of the real trainer: loss, clipping and AdamW included.

    Args:
        source: A causal LM, or a GRPO trainer whose model, processing class, rewards, number of generations, completion
            length and temperature are used. The model's weights are the same afterwards.
        questions: Rows with a `prompt` and whatever the reward functions read; taken in order until `n_questions` mixed
            ones are found.
        reward_funcs: As for `trl.GRPOTrainer`.
        processing_class: The tokenizer.
        arms: Fields of `NTHRConfig` by name of the arm; "grpo" must be among them.
        n_questions: How many mixed questions.
        correct_from: Reward from which on a response is correct (`nthr_correct`).
        seed: Of sampling.
        on_progress: Told the arm, the questions done and those wanted.
        **options: Fields of `NTHRConfig` for all arms, such as `num_generations` (8), `learning_rate` (1e-6),
            `max_completion_length`, `temperature`, `max_grad_norm`.

    Returns:
        One row per mixed question and arm: `question` (index among `questions`), `arm`, `delta`, `delta_per_token`,
        `fell_share` (correct responses that fell), `success_rate`, `n_correct`, `n_tokens` (of correct responses),
        `frac_selected` (of wrong tokens, where the method selects), `gwhes` and `logp_before` (mean over correct
        responses).

    Raises:
        ValueError: Where the arms lack "grpo", or no reward or tokenizer is known, or no question is wanted or was
            mixed.

    Example:
        >>> measure_lld(model, rows, reward_funcs=reward, processing_class=tokenizer)  # doctest: +SKIP
    """
    if BASELINE not in arms:
        raise ValueError(f'arms need "{BASELINE}", whose samples the others share; seen: {", ".join(arms)}')
    if n_questions < 1:
        raise ValueError(f"n_questions is {n_questions}; measure at least one")
    model: Any = source
    if isinstance(source, GRPOTrainer):
        model = source.model
        if reward_funcs is None:
            reward_funcs = source.reward_funcs
            options = {"reward_weights": getattr(source.args, "reward_weights", None), **options}
        processing_class = source.processing_class if processing_class is None else processing_class
        options = {name: getattr(source.args, name) for name in TAKEN_OVER} | options
    if reward_funcs is None or processing_class is None:
        raise ValueError("a model alone has neither: pass reward_funcs= and processing_class=")
    given = {"num_generations": 8, "learning_rate": 1e-6, "seed": seed, "nthr_correct": correct_from, **options}
    study = _Study(n_questions, correct_from, float(given.get("temperature", 1.0)), on_progress=on_progress)
    with _leaving_as_found(model) as start:
        for arm in sorted(arms, key=lambda name: name != BASELINE):
            if arm == BASELINE or study.questions:
                _run_arm(arm, {**given, **arms[arm]}, model, questions, reward_funcs, processing_class, study, start)
    if not study.questions:
        raise ValueError(
            f"none of {len(questions)} questions got both correct and wrong responses: choose easier or harder ones, "
            "or more generations"
        )
    return pd.DataFrame(study.results).sort_values(["question", "arm"], ignore_index=True)


def _run_arm(
    arm: str,
    fields: dict[str, Any],
    model: nn.Module,
    questions: Sequence[Mapping[str, Any]],
    reward_funcs: Any,
    processing_class: Any,
    study: _Study,
    start: dict[str, Tensor],
) -> None:
    asked = questions if arm == BASELINE else [question.row for question in study.questions]
    with tempfile.TemporaryDirectory() as folder:
        fixed = {
            "output_dir": folder,
            "per_device_train_batch_size": fields["num_generations"],
            "gradient_accumulation_steps": 1,
            "max_steps": len(asked),
            "shuffle_dataset": False,
            "lr_scheduler_type": "constant",
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "nthr_log_tokens": False,
        }
        defaults = {"bf16": False, "gradient_checkpointing": False, "use_cpu": next(model.parameters()).is_cpu}
        trainer = NTHRGRPOTrainer(
            model,
            reward_funcs,
            NTHRConfig(**{**defaults, **fields, **fixed}),
            train_dataset=Dataset.from_list([dict(row) for row in asked]),
            processing_class=processing_class,
            rollout_func=None if arm == BASELINE else _Replay(study.questions),
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        step = _OneUpdate(arm, trainer, study, start)
        trainer.add_callback(step)
        with _trl.recording_rollouts(trainer) as step.rollouts:
            trainer.train()


class _Replay:
    """A rollout function that gives the responses of the baseline arm again, question by question."""

    def __init__(self, questions: Sequence[_Question]) -> None:
        self.questions = iter(questions)

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        rows = next(self.questions).rows
        return {
            "prompt_ids": [list(row.response.prompt_ids) for row in rows],
            "completion_ids": [list(row.response.response_ids) for row in rows],
            "logprobs": None,
        }


class _OneUpdate(TrainerCallback):
    """Scores correct responses before and after each step, and puts the weights back."""

    rollouts: list[_trl.Rollout]

    def __init__(self, arm: str, trainer: NTHRGRPOTrainer, study: _Study, start: dict[str, Tensor]) -> None:
        self.arm, self.trainer, self.study, self.start = arm, trainer, study, start
        self.asked = 0
        self._question: _Question | None = None

    @property
    def _model(self) -> Any:
        return self.trainer.model

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Find the halves of the model."""
        with evaluating(self._model):
            self._split = split_model(self._model)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the rollout; in the baseline arm, decide whether it is mixed, and score it."""
        rollout = self.rollouts.pop()
        if self.arm != BASELINE:
            self._question = self.study.questions[self.asked]
            return
        rewards = _trl.summed_rewards(self.trainer, rollout.rewards_per_func).cpu()
        rows = loss_rows(rollout.batch, rollout.batch["completion_mask"].bool())
        correct = rewards >= self.study.correct_from
        usable = [bool(known) and bool(row.spans) for known, row in zip(~rewards.isnan(), rows, strict=True)]
        self._question = None
        if all(usable) and correct.any() and not correct.all():
            states = TokenStates(self._model, [row.response for row in rows], split=self._split).values()
            self._question = _Question(
                self.asked,
                rollout.inputs[0],
                rows,
                rewards,
                self._gwhes(states, correct),
                self._sums(rows, correct),
            )
            self.study.questions.append(self._question)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Score again, and put back weights and optimizer."""
        question = self._question
        self.asked += 1
        if question is not None:
            correct = question.rewards >= self.study.correct_from
            change = self._sums(question.rows, correct) - question.before
            lengths = torch.tensor([int(row.counted.sum()) for row in question.rows])[correct]
            self.study.results.append(
                {
                    "question": question.index,
                    "arm": self.arm,
                    "delta": float(change.mean()),
                    "delta_per_token": float(change.sum() / lengths.sum()),
                    "fell_share": float((change < 0).double().mean()),
                    "success_rate": float(correct.double().mean()),
                    "n_correct": int(correct.sum()),
                    "n_tokens": int(lengths.sum()),
                    "frac_selected": self._frac_selected(),
                    "gwhes": question.gwhes,
                    "logp_before": float(question.before.mean()),
                }
            )
            if self.study.on_progress is not None:
                done = sum(result["arm"] == self.arm for result in self.study.results)
                self.study.on_progress(self.arm, done, self.study.wanted)
        _put_back(self._model, self.start)
        optimizer: Any = self.trainer.optimizer
        optimizer.state.clear()
        if self.arm == BASELINE and len(self.study.questions) >= self.study.wanted:
            control.should_training_stop = True

    def _frac_selected(self) -> float | None:
        if self.trainer.config.nthr_method not in ("nthr", "random"):
            return None
        shaped = self.trainer.shaped
        assert shaped is not None, "a scoring method has shaped the batch"
        wrong = shaped.mask.cpu() & shaped.groups.wrong[:, None]
        return float(shaped.selected.sum() / wrong.sum())

    def _sums(self, rows: list[LossRow], correct: Tensor) -> Tensor:
        responses = [row.response for row, right in zip(rows, correct, strict=True) if right]
        logps = score_logps(self._model, responses, split=self._split).double()
        return torch.stack([part.sum() for part in logps.split([len(r.response_ids) for r in responses])])

    def _gwhes(self, states: HeadTokens, correct: Tensor) -> float:
        nothing = HeadTokens(states.hidden[:0], states.labels[:0], torch.zeros(0, dtype=torch.int64))
        rule = ResidualRule(exact=False, temperature=self.study.temperature)
        return gwhes(anchor_products(output_head(self._split), nothing, states, rule=rule).products, correct)


@contextmanager
def _leaving_as_found(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Restore weights, modes and what a trainer patches of `model` at the end.

    Yields:
        The trainable weights.
    """
    config: Any = model.config
    use_cache = getattr(config, "use_cache", None)
    start = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    kept = ("training", "gradient_checkpointing", "forward")  # TRL's fused head, with a temperature of its own
    found = [
        (module, {name: vars(module)[name] for name in kept if name in vars(module)}) for module in model.modules()
    ]
    try:
        yield start
    finally:
        _put_back(model, start)
        config.use_cache = use_cache
        for module, state in found:
            vars(module).pop("forward", None)
            vars(module).update(state)


def _put_back(model: nn.Module, start: Mapping[str, Tensor]) -> None:
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in start.items():
            weights[name].copy_(value)
