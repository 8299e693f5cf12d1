"""What `meta.json` says about a run: enough to know what was measured, on what, and how."""

from __future__ import annotations

import math
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from transformers import TrainerState

from llm_dynamics.callbacks.doubts import form_of_rows
from llm_dynamics.callbacks.roles import trained_on
from llm_dynamics.likelihood.head import unwrap_model
from llm_dynamics.likelihood.preserve import active_adapters, has_adapter
from llm_dynamics.probes.forms import forms

if TYPE_CHECKING:
    from llm_dynamics.callbacks.probe import ProbeCallback

PACKAGES = ("llm-dynamics", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "pandas", "pyarrow")
ARGUMENTS = (
    "loss_type", "beta", "optim", "learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm", "seed",
    "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "num_train_epochs",
    "num_generations", "temperature", "num_iterations", "nthr_method", "nthr_beta", "nthr_eta", "nthr_vocab",
    "nthr_kernel", "nthr_include_self", "nthr_correct", "thr_q", "llds_coef",
)  # fmt: skip
"""Training arguments that `meta.json` keeps, where the trainer has them."""


def describe_run(callback: ProbeCallback, state: TrainerState) -> dict[str, Any]:
    """Return the contents of `meta.json`: JSON-able, by name."""
    trainer, args = callback.trainer, callback.trainer.args
    wrapped: Any = trainer.model
    model: Any = unwrap_model(wrapped)
    parameters = list(wrapped.parameters())
    tokenizer = trainer.processing_class
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "trainer": type(trainer).__name__,
        "trained_on": trained_on(trainer),
        "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "model_class": type(model).__name__,
        "adapter": _adapter(wrapped, model),
        "adapter_config": _adapter_config(wrapped),
        "n_parameters": sum(p.numel() for p in parameters),
        "n_trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "dtype": str(next(iter(parameters)).dtype).removeprefix("torch."),
        "device": str(trainer.accelerator.device),
        "mixed_precision": trainer.accelerator.mixed_precision,
        "world_size": args.world_size,
        "tokenizer": getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__,
        "max_steps": state.max_steps,
        "arguments": {name: _plain(getattr(args, name)) for name in ARGUMENTS if hasattr(args, name)},
        "every": callback.every,
        "max_overhead": callback.options.max_overhead,
        "squeeze_strength": callback.options.squeeze_strength,
        "reference": callback.reference.source,
        "truncation": {"max_length": callback.truncation.max_length, "mode": callback.truncation.mode},
        "forms": forms(callback.probes, tokenizer, form_of_rows(trainer)),
        "rendering": _plain(callback.rendering),
        "n_truncated": callback.encoded.n_truncated,
        "boundary_merges": callback.encoded.boundary_merges,
        "n_probes": len(callback.encoded),
        "families": list(callback.probes.families),
        "probes_fingerprint": callback.probes.fingerprint(),
        "probes": _plain(dict(callback.probes.metadata)),
        "dropped_probes": [
            *({"source_row": d.source_row, "family": d.family, "reason": d.reason} for d in callback.probes.dropped),
            *({"probe_id": probe_id, "reason": reason} for probe_id, reason in callback.encoded.dropped),
        ],
    }


def _adapter(wrapped: Any, model: Any) -> str | None:
    """Return what holds the adapters: the class of the PEFT model, or transformers, which put them into the model."""
    if wrapped is not model:
        return type(wrapped).__name__
    return "transformers" if has_adapter(wrapped) else None


def _adapter_config(model: Any) -> dict[str, Any] | None:
    """Return what the (first) active adapter was configured with: its non-empty settings."""
    if not has_adapter(model):
        return None
    settings = model.peft_config[active_adapters(model)[0]].to_dict()
    return {
        name: sorted(map(str, value)) if isinstance(value, set) else _plain(value)
        for name, value in settings.items()
        if value not in (None, {}, [], "")
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
