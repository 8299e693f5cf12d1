"""Settings of `NTHRGRPOTrainer`: those of TRL's GRPO, and what is done to the advantages of tokens."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Annotated, Any

from trl import GRPOConfig

from llm_dynamics import _trl
from llm_dynamics.options import LARGEST, Limit, check_options, shown

METHODS = ("nthr", "thr", "pos_only", "w_reinforce", "nsr", "random", "none")
SCORED_METHODS = ("nthr", "thr", "random")
"""Methods that need token scores."""
ETAS: dict[str, Callable[[float], float]] = {
    "2|0.5-p|": lambda p: 2 * abs(0.5 - p),
    "p": lambda p: p,
    "1-p": lambda p: 1 - p,
}
"""What `nthr_eta` may name, as functions of a question's success rate p."""


@dataclass
class NTHRConfig(GRPOConfig):
    """Configuration of `NTHRGRPOTrainer`: every field of `trl.GRPOConfig`, and these.

    The papers are [NTHR] (Deng et al., arXiv 2505.18830), [THR] (arXiv 2510.03669), [NSR] (arXiv 2506.01347) and
    [LLDS] (arXiv 2512.04220).

    Attributes:
        nthr_method: What is done to the advantages: "nthr" down-weights wrong tokens that push correct responses down;
            "thr" reweights all tokens by their score; "pos_only" drops negative advantages; "w_reinforce" and "nsr"
            replace them; "random" down-weights as many wrong tokens as "nthr", drawn at random; "none" is TRL's GRPO.
        nthr_beta: Threshold factor: tau = beta min over correct responses of their anchor score. -inf selects every
            token of wrong responses, inf none.
        nthr_eta: Factor on the advantage of selected tokens: "2|0.5-p|", "p", "1-p" with p the share of correct
            responses to the question, or a number.
        nthr_include_self: Whether a correct response's anchor score counts its tokens against itself.
        nthr_vocab: Entries of the vocabulary over which predictions are compared: "full", or "group", those that the
            group's responses contain (not renormalised).
        nthr_correct: Reward, weighted and summed over the reward functions, from which on a response is correct.
        nthr_kernel: "last_layer", the papers' score, or "exact", the token kernel over all trainable parameters, for
            study: one backward per token.
        thr_q: q of [THR]: > 0 favours exploitation, < 0 exploration.
        w_reinforce_weight: Advantage of correct responses in "w_reinforce"; wrong ones have -1.
        llds_coef: Factor lambda of the [LLDS] penalty on responses with a non-negative advantage whose log-prob fell
            since rollout, a mean over these responses; 0: none. The paper's is 0.2.
        nthr_log_tokens: Keep a table of tokens, with scores and advantages, in the run log that `watch` opens.
    """

    nthr_method: Annotated[str, Limit(choices=METHODS)] = field(
        default="nthr",
        metadata={"help": "What is done to token advantages.", "choices": list(METHODS)},
    )
    nthr_beta: Annotated[float, Limit(infinite=True)] = field(
        default=1.0,
        metadata={"help": "Threshold factor on the smallest anchor score; -inf selects all wrong tokens, inf none."},
    )
    nthr_eta: Annotated[str, "or a number: checked by `eta`"] = field(
        default="2|0.5-p|",
        metadata={"help": "Factor on selected tokens: '2|0.5-p|', 'p', '1-p' or a number; p is the success rate."},
    )
    nthr_include_self: bool = field(
        default=True,
        metadata={"help": "Whether a correct response's anchor score counts its tokens against itself."},
    )
    nthr_vocab: Annotated[str, Limit(choices=("full", "group"))] = field(
        default="full",
        metadata={"help": "Vocabulary over which predictions are compared.", "choices": ["full", "group"]},
    )
    nthr_correct: float = field(
        default=0.5,
        metadata={"help": "Reward (weighted sum over reward functions) from which on a response is correct."},
    )
    nthr_kernel: Annotated[str, Limit(choices=("last_layer", "exact"))] = field(
        default="last_layer",
        metadata={"help": "Which kernel scores tokens.", "choices": ["last_layer", "exact"]},
    )
    thr_q: Annotated[float, Limit(most=LARGEST)] = field(
        default=0.1,
        metadata={"help": "Strength of THR reweighting; > 0 favours exploitation, < 0 exploration."},
    )
    w_reinforce_weight: Annotated[float, Limit(most=LARGEST)] = field(
        default=0.1,
        metadata={"help": "Advantage of correct responses in w_reinforce; wrong ones have -1."},
    )
    llds_coef: Annotated[float, Limit(least=0, most=LARGEST)] = field(
        default=0.0,
        metadata={"help": "Factor of the LLDS penalty on likelihood that fell since rollout; the paper's is 0.2."},
    )
    nthr_log_tokens: bool = field(
        default=True,
        metadata={"help": "Keep a table of token scores and advantages in the run log that `watch` opens."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check()

    @staticmethod
    def over(args: GRPOConfig) -> NTHRConfig:
        """Return a GRPO configuration with this one's fields beside its own.

        Args:
            args: Any `GRPOConfig`. It is left as it is.

        Returns:
            `args` itself where it has these fields. Else a copy, of a class that is both an `NTHRConfig` and the class
            of `args`: every field and attribute as it is there, the fields of `NTHRConfig` at their defaults.

        Raises:
            TypeError: For anything else than a `GRPOConfig`.
            ValueError: For settings that `NTHRConfig` refuses, such as a loss that knows no token advantages.
        """
        if isinstance(args, NTHRConfig):
            return args
        if not isinstance(args, GRPOConfig):
            raise TypeError(f"args must be an NTHRConfig or another GRPOConfig; seen {type(args).__name__}")
        given: Any = type(args)
        kind = _beside(given)
        config = kind.__new__(kind)  # without `__post_init__`, which has filled what is derived already
        ours = {own.name: own.default for own in fields(NTHRConfig) if own.name not in vars(args)}
        vars(config).update({**ours, **vars(args)})
        config._check()
        return config

    def _check(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            ValueError: Naming the field, the value seen and what is allowed.
        """
        check_options(self, NTHRConfig)
        self.eta(0.5)
        if self.loss_type not in _trl.LOSSES_BY_TOKEN:
            raise ValueError(
                f"loss_type is {self.loss_type!r}; NTHRGRPOTrainer knows which losses honour advantages token by "
                f"token: {', '.join(_trl.LOSSES_BY_TOKEN)}"
            )
        if self.nthr_kernel == "exact" and self.nthr_method in SCORED_METHODS:
            if self.temperature != 1.0:
                raise ValueError(
                    f"temperature is {self.temperature}; nthr_kernel='exact' takes gradients of the log-prob at "
                    "temperature 1: set temperature=1.0, or nthr_kernel='last_layer'"
                )
            if self.nthr_vocab != "full":
                raise ValueError("nthr_vocab='group' restricts the last layer; with nthr_kernel='exact' set 'full'")
        by_response = self.importance_sampling_level == "sequence" and self.loss_type not in ("cispo", "vespo")
        if by_response and self.nthr_method in SCORED_METHODS:
            warnings.warn(
                "importance_sampling_level='sequence' gives all tokens of a response one ratio, so that token "
                "advantages act through their mean alone: which tokens were chosen makes no difference",
                stacklevel=3,
            )
        inner = self.num_iterations * (self.steps_per_generation or 1) / self.gradient_accumulation_steps
        if self.llds_coef and inner <= 1:
            raise ValueError(
                f"llds_coef is {self.llds_coef}, but each batch of rollouts gets one update, before which nothing can "
                "have fallen: set num_iterations > 1, or steps_per_generation > gradient_accumulation_steps"
            )

    def eta(self, p: float) -> float:
        """Return the factor on selected tokens of a question with success rate `p`.

        Raises:
            ValueError: Where `nthr_eta` is neither a known rule nor a finite number.
        """
        rule = ETAS.get(self.nthr_eta) if isinstance(self.nthr_eta, str) else None
        if rule is not None:
            return rule(p)
        try:
            value = float(self.nthr_eta) if isinstance(self.nthr_eta, str | numbers.Real) else math.nan
        except (OverflowError, ValueError):
            value = math.nan
        if not 0 <= value <= LARGEST:  # less than 0 would reward wrong tokens
            raise ValueError(
                f"nthr_eta is {shown(self.nthr_eta)}; allowed: {', '.join(map(repr, ETAS))}, or a finite number from 0 "
                f"on, to {LARGEST:g}"
            )
        return value


@cache
def _beside(given: Any) -> type[NTHRConfig]:
    """Return a class with the fields of `NTHRConfig` and those of a class of GRPO configurations."""
    if given is GRPOConfig:
        return NTHRConfig
    # with no name to be imported by, it is pickled (`training_args.bin`) by the class that it was made for
    members = {"__reduce__": lambda self: (_restored, (given, vars(self)))}
    return dataclass(type(f"NTHR{given.__name__}", (NTHRConfig, given), members))


def _restored(given: Any, state: dict[str, Any]) -> NTHRConfig:
    config = _beside(given).__new__(_beside(given))
    vars(config).update(state)
    return config
