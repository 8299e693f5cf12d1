"""A drop-in `GRPOTrainer` that shapes advantages token by token, so that correct answers are not unlearned."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from llm_dynamics import _trl
from llm_dynamics.callbacks.model_card import append_dynamics
from llm_dynamics.kernel.output_head import output_head
from llm_dynamics.kernel.residuals import ResidualRule
from llm_dynamics.likelihood.head import SplitModel, split_model, unwrap_model
from llm_dynamics.likelihood.preserve import evaluating
from llm_dynamics.likelihood.sharded import gathered
from llm_dynamics.rollouts import Groups, LossRow, loss_rows
from llm_dynamics.trainers.nthr.config import SCORED_METHODS, NTHRConfig
from llm_dynamics.trainers.nthr.llds import llds_penalty
from llm_dynamics.trainers.nthr.model_card import METHODS, NTHR_PAPER
from llm_dynamics.trainers.nthr.refusals import refuse_what_cannot_be_scored
from llm_dynamics.trainers.nthr.scores import GroupScores, score_group, score_group_exactly
from llm_dynamics.trainers.nthr.shaping import Scorer, ShapedBatch, shape_batch
from llm_dynamics.trainers.nthr.states import completion_states, has_dropout
from llm_dynamics.trainers.nthr.token_log import TokenLog
from llm_dynamics.trainers.nthr.token_pool import TokenPool


class NTHRGRPOTrainer(GRPOTrainer):
    """GRPO with negative-token-hidden-reward down-weighting [NTHR], and its relatives, as a drop-in.

    GRPO penalises every token of a wrong response alike, also those that the correct responses of its group share:
    their likelihood then rises lazily, or falls (*lazy likelihood displacement*). NTHR scores each wrong token by how
    much its gradient has to do with those of the correct responses (`scores`), and multiplies the penalty of those
    above a threshold by eta. All else is TRL's: same arguments, losses, generation, logging; nothing of its loss is
    repeated here.

    Scores are taken once per generation under the policy that rolled out (the sampling temperature, the model's logit
    scale and soft cap included; top-k and top-p do not enter, as they do not enter TRL's loss), without dropout. They
    need the hidden states of the completions: those of the pass for `old_per_token_logps` where TRL makes one and the
    model has no dropout, else one pass without gradient through the backbone. The vocabulary is met in blocks.

    Memory beside TRL's: the completions' hidden states (B T d numbers in the model's precision), (B, T) tables, and per
    group logits of at most 1 GiB; see `TokenPool` for what processes exchange.

    Metrics in the trainer's own rows, over mixed groups: `nthr/frac_downweighted` (share of the wrong responses' tokens
    that were selected), `nthr/score_mean`, `nthr/threshold`, `nthr/eta`; over all groups: `nthr/p`. Where `watch` keeps
    a run log, its table `nthr_tokens` tells token by token what was spared.

    Rewards that are not binary: `nthr_correct` parts correct from wrong; only tokens with a penalty (a negative
    advantage) are ever down-weighted. Responses without a reward are neither correct nor wrong, and count in no p.

    Args:
        model: As for `trl.GRPOTrainer`.
        reward_funcs: As for `trl.GRPOTrainer`.
        args: An `NTHRConfig`, or a `trl.GRPOConfig` or a subclass of it: then with the defaults of `NTHRConfig` beside
            it (`NTHRConfig.over`); None: all defaults.
        **kwargs: All other arguments of `trl.GRPOTrainer`.

    Raises:
        TypeError: Where `args` is no GRPO configuration.
        NotImplementedError: For vision-language models, and for models whose LM head has no closed form.

    Example:
        >>> trainer = NTHRGRPOTrainer(
        ...     model, reward_funcs=reward, args=NTHRConfig("out"), train_dataset=rows
        ... )  # doctest: +SKIP
    """

    _tag_names = ["trl", "grpo", "nthr"]  # noqa: RUF012 - as TRL has it
    _name = "NTHR"
    _paper = NTHR_PAPER

    def __init__(self, model: Any, reward_funcs: Any = None, args: GRPOConfig | None = None, **kwargs: Any) -> None:
        if args is None:
            name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or "model"
            args = NTHRConfig(f"{name.rstrip('/').split('/')[-1]}-NTHR")
        args = NTHRConfig.over(args)
        if reward_funcs is None and not kwargs.get("environment_factory"):
            raise ValueError("reward_funcs is None; pass a reward function, a reward model, or a list of them")
        super().__init__(model, reward_funcs, args, **kwargs)
        refuse_what_cannot_be_scored(self, evaluates=kwargs.get("eval_dataset") is not None)
        self.shaped: ShapedBatch | None = None
        self._split: SplitModel | None = None
        self._generated = (0, -1)  # the step of the last generation for training, and its number within that step
        self._token_log: TokenLog | None = None
        if args.nthr_log_tokens:
            self._token_log = TokenLog(self)
            self.add_callback(self._token_log)

    @property
    def config(self) -> NTHRConfig:
        """The trainer's `args`."""
        return cast(NTHRConfig, self.args)

    @property
    def _policy(self) -> Any:
        return self.model

    @property
    def _backbone(self) -> torch.nn.Module:
        return cast(torch.nn.Module, unwrap_model(self._policy).base_model)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As TRL's, naming the method in use, and where the run is watched, with a section on its learning dynamics."""
        self._name, self._paper = METHODS[self.config.nthr_method]
        super().create_model_card(*args, **kwargs)
        append_dynamics(self)

    # ---- the overrides ------------------------------------------------------------------------------------------

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._rewards: Tensor = super()._calculate_rewards(*args, **kwargs)
        return self._rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self._policy.training:
            step, number = self.state.global_step, self._generated[1]
            self._generated = (step, number + 1 if step == self._generated[0] else 0)
        if self.config.nthr_method == "none":
            batch = super()._generate_and_score_completions(inputs)
            if self._token_log is not None:
                self._shape(batch, None)  # for the run log: the batch stays as it is
        else:
            needs_states = self.config.nthr_method in SCORED_METHODS and self.config.nthr_kernel == "last_layer"
            backbone = self._backbone if needs_states and not has_dropout(self._policy) else None
            with _trl.recording_logp_passes(self, backbone) as passes:
                batch = super()._generate_and_score_completions(inputs)
            old = batch.get("old_per_token_logps")
            states = next((one.states for one in passes if one.logps is old and old is not None), None)
            passes.clear()
            self._shape(batch, states)
        if self.config.llds_coef:
            advantages = self.shaped.before if self.shaped is not None else batch["advantages"]
            kept = self._gather((advantages >= 0).double()).mean()
            batch |= {"response_advantages": advantages, "kept_share": kept.expand(len(advantages)).clone()}
        return batch

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if not self.config.llds_coef or "old_per_token_logps" not in inputs:
            return super()._compute_loss(model, inputs)
        with _trl.recording_logp_passes(self, policy=model) as passes:
            loss = super()._compute_loss(model, inputs)
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        training = bool(self._policy.training)
        logps = passes[0].logps
        if not training or self.state.global_step == self._generated[0]:
            # The weights are those of the rollout: what differs is dropout or rounding. The penalty would be small, but
            # its gradient is a step function of the difference.
            logps = inputs["old_per_token_logps"]
        kept = inputs["response_advantages"], mask, inputs["kept_share"].to(logps.dtype)
        penalty = llds_penalty(logps, inputs["old_per_token_logps"], *kept)
        _trl.append_metric(self, training, "llds/penalty", self._gather(penalty.detach()).mean().item())
        steps = self.current_gradient_accumulation_steps if training else 1
        return loss + self.config.llds_coef * penalty / steps

    # ---- shaping ----------------------------------------------------------------------------------------------------

    def _shape(self, batch: dict[str, Any], states: Tensor | None) -> None:
        """Put token advantages into `batch`, and keep what they were made of."""
        mask = batch["completion_mask"].bool()
        if "tool_mask" in batch:
            mask &= batch["tool_mask"].bool()
        training = bool(self._policy.training)
        groups = Groups(
            size=_trl.group_size(self, training),
            first=self.accelerator.process_index * len(mask),
            count=len(mask),
            rewards=_trl.summed_rewards(self, self._rewards).cpu(),
            lengths=self._gather(mask.sum(dim=1)).cpu(),
            correct_from=self.config.nthr_correct,
        )
        score = self._scorer(batch, mask, groups, states)
        with torch.no_grad(), gathered(self._policy):
            self.shaped = shape_batch(
                self.config,
                groups,
                batch["advantages"],
                mask,
                score,
                seed=self._draw_seed(),
                count_selected=self._gather,
            )
        if self.config.nthr_method != "none":
            batch["advantages"] = self.shaped.advantages.to(batch["advantages"])
        self._log_shape(self.shaped, training)
        if self._token_log is not None and training:
            self._token_log.keep(batch, self.shaped)

    def _scorer(self, batch: dict[str, Any], mask: Tensor, groups: Groups, states: Tensor | None) -> Scorer:
        config = self.config
        if config.nthr_method not in SCORED_METHODS:
            return _never_scores
        self._split = self._split or self._split_model()
        if config.nthr_kernel == "exact":
            return self._exact_scorer(loss_rows(batch, mask), groups)
        mixed = any(groups.is_mixed(range(i, i + groups.size)) for i in range(0, len(groups.rewards), groups.size))
        if not mixed:
            return _never_scores  # on all processes alike
        if states is None:
            states = self._completion_states(batch, groups)
        pool = TokenPool(states, batch["completion_ids"], mask, groups, self.accelerator)
        head = cache(partial(output_head, self._split))  # read when what is sharded has been gathered

        def score(group: range, right: list[int], scored: list[int]) -> GroupScores:
            vocabulary = pool.vocabulary(group) if config.nthr_vocab == "group" else None
            tokens = pool.tokens(scored)
            own = [right.index(row) if row in right else -1 for row in scored]
            return score_group(
                head(),
                pool.tokens(right),
                tokens,
                own=torch.repeat_interleave(torch.tensor(own, dtype=torch.int64), tokens.lengths),
                include_self=config.nthr_include_self,
                by_length=config.nthr_method == "thr",
                rule=ResidualRule(exact=False, temperature=self.temperature, vocabulary=vocabulary),
            )

        return score

    def _exact_scorer(self, rows: list[LossRow], groups: Groups) -> Scorer:
        config = self.config

        def score(group: range, right: list[int], scored: list[int]) -> GroupScores:
            correct, others = ([rows[row - groups.first] for row in chosen] for chosen in (right, scored))
            filled = [row for row in others if row.spans]
            anchored = [row for row in correct if row.spans]
            values, anchors = score_group_exactly(
                self._policy,
                [row.response for row in anchored],
                [row.spans for row in anchored],
                [row.response for row in filled],
                own=[next((i for i, other in enumerate(anchored) if other is row), -1) for row in filled],
                include_self=config.nthr_include_self,
                by_length=config.nthr_method == "thr",
                split=self._split,
            )
            kept = [v[row.counted] for v, row in zip(values, filled, strict=True)]
            every = torch.full((len(correct),), torch.nan, dtype=anchors.dtype)
            every[torch.tensor([bool(row.spans) for row in correct])] = anchors
            return GroupScores(torch.cat([anchors[:0], *kept]), every)

        return score

    def _split_model(self) -> SplitModel:
        with evaluating(self._policy), self.accelerator.autocast():
            split = split_model(self._policy)
        if self.config.nthr_kernel == "last_layer":
            with gathered(self._policy):
                output_head(split)  # refuses heads without a closed form, by name
        return split

    def _completion_states(self, batch: dict[str, Any], groups: Groups) -> Tensor:
        """Run a pass of our own over the rollouts of mixed groups: (B, T, d)."""
        args = self.args
        checkpointing: Any = args.gradient_checkpointing_kwargs
        with (
            evaluating(self._policy),
            _trl.disable_gradient_checkpointing(self._policy, checkpointing),
            self.accelerator.autocast(),
        ):
            return completion_states(
                self._policy,
                self._backbone,
                batch,
                groups,
                size=args.per_device_train_batch_size if self._policy.training else args.per_device_eval_batch_size,
            )

    def _draw_seed(self) -> int:
        """Seed of method "random": another one for each generation, and the same after a resume."""
        step, number = self._generated
        return self.config.seed + 65_537 * step + number

    def _gather(self, values: Tensor) -> Tensor:
        return self.accelerator.gather(values.contiguous())

    def _log_shape(self, shaped: ShapedBatch, training: bool) -> None:
        if self.config.nthr_method not in SCORED_METHODS:
            return
        groups = shaped.groups
        wrong = shaped.mask & groups.wrong[groups.local].to(shaped.mask.device)[:, None]
        wrong &= ~shaped.thresholds.isnan()[:, None]
        scored = wrong & ~shaped.scores.isnan()
        counts = (shaped.selected.sum(1), wrong.sum(1), scored.sum(1), shaped.scores.where(scored, 0).sum(1))
        columns = [count.float() for count in counts] + [shaped.thresholds, shaped.etas, shaped.success]
        selected, of, n, total, threshold, eta, p = self._gather(torch.stack(columns, dim=1)).double().T
        metrics = {
            "frac_downweighted": selected.sum() / of.sum(),
            "score_mean": total.sum() / n.sum(),
            "threshold": threshold[threshold.isfinite()].mean(),  # reporters take no infinity
            "eta": eta.nanmean(),
            "p": p.nanmean(),
        }
        for name, value in metrics.items():
            _trl.append_metric(self, training, f"nthr/{name}", value.item())  # NaN: no group was mixed


def _never_scores(group: range, right: list[int], scored: list[int]) -> GroupScores:
    raise AssertionError("no group is scored by this method")
