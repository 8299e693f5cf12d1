"""The tables of the step account: what moved the probes in one explained optimizer step.

They lie beside the observations, one part per explained step and table::

    influence/step_000000025.parquet          one row per target and cause
    influence_tokens/step_000000025.parquet   one row per probe token and cause (on request)
    training_examples/step_000000025.parquet  one row per training example of the step
    training_tokens/step_000000025.parquet    one row per target and training token
    influence_maps/step_000000025.parquet     one row per probe token and training token (of selected pairs)
    accounts/step_000000025.parquet           one row: the account as a whole; written last, so that its presence
                                              marks the account as complete

A target is one probe, or the mean over the probes of a family. A share is signed and in nats: what a cause, or a
training token, did to the target's summed log-prob in this one step. Over the causes, `remainder` included, the shares
of a target add up to `measured`.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from llm_dynamics.runlog.columns import described

_STEP = (pa.int64(), "optimizer steps done after the explained update")

INFLUENCE = described(
    {
        "step": _STEP,
        "family": (pa.string(), "family of the probes, see probes.parquet"),
        "probe_id": (pa.string(), "see probes.parquet; null where the row is the mean over the family's probes"),
        "n_probes": (pa.int32(), "probes that the row is a mean over"),
        "cause": (
            pa.string(),
            "up, down (or another label of the tokens), momentum, other, precision, decay, rounding, step, remainder",
        ),
        "share": (pa.float64(), "the cause's part of measured, nats; over causes the shares add up to measured"),
        "own_share": (
            pa.float64(),
            "the part of share from training examples with the probe's own prompt, null where not measured",
        ),
        "measured": (pa.float64(), "change of the summed log-prob over this one optimizer step, nats"),
    }
)

INFLUENCE_TOKENS = described(
    {
        "step": _STEP,
        "probe_id": (pa.string(), "see probes.parquet"),
        "position": (pa.int32(), "m, index in the response, from 0"),
        "cause": (pa.string(), "as in influence"),
        "share": (pa.float64(), "the cause's part of measured, nats; over causes the shares add up to measured"),
        "measured": (pa.float64(), "change of log pi(y_m | own prefix) over this one optimizer step, nats"),
    }
)

TRAINING_EXAMPLES = described(
    {
        "step": _STEP,
        "example": (pa.int32(), "index in the global batch of the step"),
        "row": (pa.int64(), "row of trainer.train_dataset, null where its tokens do not tell"),
        "role": (pa.string(), "chosen, rejected, desirable, undesirable, ..., or trained where the loss has one role"),
        "prompt_id": (pa.string(), "id of the probes with this prompt, null where no probe has it"),
        "prompt": (pa.string(), "prompt as fed to the model, decoded"),
        "response": (pa.string(), "tokens with a loss, decoded"),
        "n_tokens": (pa.int32(), "L, tokens with a loss"),
        "c_sum": (pa.float64(), "sum_l c_l, see training_tokens"),
    },
    added=["row"],
)

TRAINING_TOKENS = described(
    {
        "step": _STEP,
        "target": (pa.string(), "name of a family, or a probe_id"),
        "kind": (pa.string(), "what target is: family (mean over its probes) or probe"),
        "example": (pa.int32(), "see training_examples"),
        "position": (pa.int32(), "l, index among the example's tokens with a loss, from 0"),
        "token_id": (pa.int32(), "y_l"),
        "token": (pa.string(), "decoded y_l"),
        "logp": (pa.float64(), "log pi(y_l) when the step was taken, nats"),
        "c": (pa.float64(), "c_l = dL/d log pi(y_l) of the global step; < 0 pulls the token up, > 0 pushes it down"),
        "share": (
            pa.float64(),
            "what the token did to the target's summed log-prob through this step's gradient (no momentum), nats",
        ),
    }
)

INFLUENCE_MAPS = described(
    {
        "step": _STEP,
        "probe_id": (pa.string(), "see probes.parquet"),
        "example": (pa.int32(), "see training_examples"),
        "m": (pa.int32(), "position of the probe token, from 0"),
        "l": (pa.int32(), "position of the training token, as in training_tokens"),
        "share": (pa.float64(), "what training token l did to log pi(y_m) of the probe in this step, nats"),
    }
)

ACCOUNTS = described(
    {
        "step": _STEP,
        "rule": (pa.string(), "quadrature rule along the update: start, midpoint or gauss2"),
        "explained": (
            pa.float64(),
            "1 - |measured - accounted|^2 / |measured|^2 over all explained probe tokens; NaN if none moved",
        ),
        "explained_by_gradient": (pa.float64(), "the same for the best-scaled -grad, null where not measured"),
        "measured_norm": (pa.float64(), "|measured| over all explained probe tokens, nats"),
        "remainder_norm": (pa.float64(), "|measured - accounted| over all explained probe tokens, nats"),
        "learning_rate": (pa.float64(), "learning rate of the step"),
        "clip_factor": (pa.float64(), "factor on the gradient by clipping, 1 where nothing was clipped"),
        "grad_norm": (pa.float64(), "norm of the gradient before clipping"),
        "seconds": (pa.float64(), "wall time that explaining the step took"),
        "optimizer": (pa.string(), "class of the optimizer"),
        "note": (pa.string(), "what a reader must know, such as an optimizer that could not be split; null if nothing"),
    }
)

ACCOUNT_TABLES: Mapping[str, pa.Schema] = {
    "influence": INFLUENCE,
    "influence_tokens": INFLUENCE_TOKENS,
    "training_examples": TRAINING_EXAMPLES,
    "training_tokens": TRAINING_TOKENS,
    "influence_maps": INFLUENCE_MAPS,
    "accounts": ACCOUNTS,
}
"""Tables with one part per explained step, in the order they are written: `accounts` is last and marks completeness.

An account has at least `influence` and `accounts`."""
