"""Every optimizer that is taken apart, with its options, and its parts by the formulas, from all gradients so far."""

from dataclasses import dataclass

import torch
from torch.optim import SGD, Adam, AdamW, RMSprop

from llm_dynamics.influence import BeforeStep, split_update

STEPS = 4
SHAPES = {"matrix": (7, 5), "bias": (5,), "scalar": (), "idle": (3,)}

CASES = {
    "sgd": (SGD, {}),
    "sgd_weight_decay": (SGD, {"weight_decay": 0.1}),
    "sgd_maximize_weight_decay": (SGD, {"weight_decay": 0.1, "maximize": True}),
    "sgd_momentum": (SGD, {"momentum": 0.9}),
    "sgd_dampening": (SGD, {"momentum": 0.8, "dampening": 0.3}),
    "sgd_dampening_weight_decay": (SGD, {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1}),
    "sgd_nesterov": (SGD, {"momentum": 0.9, "nesterov": True}),
    "sgd_nesterov_weight_decay_maximize": (
        SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True}),
    "sgd_foreach_momentum": (SGD, {"momentum": 0.9, "foreach": True}),
    "sgd_foreach_nesterov": (SGD, {"momentum": 0.9, "nesterov": True, "foreach": True}),
    "sgd_foreach_nesterov_weight_decay": (
        SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "foreach": True}),
    "sgd_foreach_nesterov_maximize": (SGD, {"momentum": 0.9, "nesterov": True, "maximize": True, "foreach": True}),
    "sgd_fused_nesterov": (SGD, {"momentum": 0.9, "nesterov": True, "fused": True}),
    "sgd_fused_weight_decay": (SGD, {"momentum": 0.9, "weight_decay": 0.1, "fused": True}),
    "adam": (Adam, {}),
    "adam_weight_decay": (Adam, {"weight_decay": 0.1}),
    "adam_amsgrad_maximize": (Adam, {"amsgrad": True, "maximize": True}),
    "adam_foreach_weight_decay_maximize": (Adam, {"weight_decay": 0.1, "maximize": True, "foreach": True}),
    "adam_fused_weight_decay": (Adam, {"weight_decay": 0.1, "fused": True}),
    "adam_decoupled_weight_decay_adamw": (Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adamw": (AdamW, {"weight_decay": 0.0}),
    "adamw_weight_decay": (AdamW, {"weight_decay": 0.1}),
    "adamw_amsgrad_maximize": (AdamW, {"weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    "adamw_large_eps": (AdamW, {"eps": 0.1, "betas": (0.7, 0.95)}),
    "adamw_tensor_lr": (AdamW, {"lr": torch.tensor(0.01, dtype=torch.float64), "weight_decay": 0.1}),
    "adamw_foreach": (AdamW, {"weight_decay": 0.1, "foreach": True}),
    "adamw_foreach_amsgrad": (AdamW, {"amsgrad": True, "foreach": True, "weight_decay": 0.0}),
    "adamw_fused": (AdamW, {"weight_decay": 0.1, "fused": True}),
    "adamw_fused_amsgrad_maximize": (AdamW, {"amsgrad": True, "maximize": True, "fused": True}),
    "rmsprop": (RMSprop, {}),
    "rmsprop_weight_decay_maximize": (RMSprop, {"weight_decay": 0.1, "maximize": True}),
    "rmsprop_momentum": (RMSprop, {"momentum": 0.9}),
    "rmsprop_momentum_centered": (RMSprop, {"momentum": 0.9, "centered": True, "alpha": 0.9}),
    "rmsprop_momentum_weight_decay_centered": (RMSprop, {"momentum": 0.9, "centered": True, "weight_decay": 0.1}),
    "rmsprop_foreach_momentum_centered": (RMSprop, {"momentum": 0.9, "centered": True, "foreach": True}),
}  # fmt: skip


class Model:
    """Named parameters in two groups of an optimizer, one of which never gets a gradient."""

    def __init__(self, case, dtype, *, lr=0.01, scale=1.0, unlabelled=0.0):
        torch.manual_seed(0)
        make, options = CASES[case]
        self.parameters = {n: torch.nn.Parameter((scale * torch.randn(s)).to(dtype)) for n, s in SHAPES.items()}
        self.stepped = [name for name in SHAPES if name != "idle"]
        one, *others = self.parameters.values()
        groups = [{"params": [one]}, {"params": others}]
        if "lr" not in options:
            options = options | {"lr": lr}
            groups[1]["lr"] = lr / 3
        if options.get("weight_decay"):
            groups[1]["weight_decay"] = 0.02
        self.optimizer = make(groups, **options)
        self.unlabelled = unlabelled

    def group(self, name):
        return self.optimizer.param_groups[0 if name == "matrix" else 1]


@dataclass
class Step:
    """A step with what went into it; gradients before clipping."""

    before: BeforeStep
    after: dict
    gradients: dict
    unlabelled: dict
    updates: list

    @property
    def update(self):
        return self.updates[0]


def take_step(model, t, *, clip=1.0, history=None, labels=("up", "down")):
    """Step on random gradients of the labels, drawn from `t`; split by each of the histories."""
    generator = torch.Generator().manual_seed(100 + t)

    def draw(factor):
        def one(parameter):
            wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            return factor * torch.randn(parameter.shape, generator=generator, dtype=wide)

        return {name: one(model.parameters[name]) for name in model.stepped}

    gradients = {label: draw(1.0 + k) for k, label in enumerate(labels)}
    unlabelled = draw(model.unlabelled)
    for name in model.stepped:
        parameter = model.parameters[name]
        whole = sum(g[name] for g in gradients.values()) + unlabelled[name]
        parameter.grad = (clip * whole).to(parameter.dtype)
    before = BeforeStep.of(model.optimizer, model.parameters)
    model.optimizer.step()
    updates = []
    for one in history if isinstance(history, list) else [history]:
        copies = {label: {n: g.clone() for n, g in by_name.items()} for label, by_name in gradients.items()}
        updates.append(split_update(model.optimizer, model.parameters, before, copies, clip_factor=clip, history=one))
    after = {name: parameter.detach().clone() for name, parameter in model.parameters.items()}
    return Step(before, after, gradients, unlabelled, updates)


def parts_by_formula(model, steps, name, clip):
    """Momentum, labels and decay of the last of `steps`, from the gradients of all, without the optimizer's state."""
    group, theta = model.group(name), steps[-1].before.weights[name]
    lr, wd, sign = float(group["lr"]), group["weight_decay"], -1.0 if group["maximize"] else 1.0
    kind = type(model.optimizer)
    decoupled = kind is AdamW or group.get("decoupled_weight_decay", False)
    coupled = 0.0 if decoupled else wd
    labels = [{label: sign * clip * g[name] for label, g in step.gradients.items()} for step in steps]
    whole = [sum(g.values()) + coupled * step.before.weights[name] for g, step in zip(labels, steps, strict=True)]
    if kind is SGD:
        mu, damp = group["momentum"], 1 - group["dampening"]
        past = torch.zeros_like(theta)
        for k, d in enumerate(whole[:-1]):
            past = d if k == 0 else mu * past + damp * d
        intake = 1.0 if len(steps) == 1 else damp
        if mu == 0:
            of_gradient, of_past = 1.0, None
        elif group["nesterov"]:  # d + mu (mu past + d)
            of_gradient, of_past = 1 + mu * intake, mu * mu
        else:
            of_gradient, of_past = intake, mu
    elif kind is RMSprop:
        alpha, mu = group["alpha"], group["momentum"]
        square = mean = past = torch.zeros_like(theta)
        for k, d in enumerate(whole):
            square, mean = alpha * square + (1 - alpha) * d * d, alpha * mean + (1 - alpha) * d
            scale = 1 / ((square - mean * mean if group["centered"] else square).sqrt() + group["eps"])
            if k < len(whole) - 1:
                past = mu * past + d * scale
        of_gradient, of_past = scale, mu or None
    else:
        beta1, beta2 = group["betas"]
        past = second = largest = torch.zeros_like(theta)
        for k, d in enumerate(whole):
            second = beta2 * second + (1 - beta2) * d * d
            largest = torch.maximum(largest, second)
            if k < len(whole) - 1:
                past = beta1 * past + (1 - beta1) * d
        t = len(whole)
        denominator = ((largest if group["amsgrad"] else second) / (1 - beta2**t)).sqrt() + group["eps"]
        scale = 1 / denominator / (1 - beta1**t)
        of_gradient, of_past = (1 - beta1) * scale, beta1 * scale
    parts = {label: -lr * of_gradient * gradient for label, gradient in labels[-1].items()}
    if of_past is not None and len(steps) > 1:
        parts["momentum"] = -lr * of_past * past
    if wd:
        parts["decay"] = -lr * wd * theta * (1.0 if decoupled else of_gradient)
    return parts


def largest_excess(model, step):
    """By how much |rounding| exceeds k ulp(weight) + 3 eps sum |parts| at most, over all elements; <= 0 within it.

    Storing the weight rounds by half an ulp; a decoupled decay stores it once more, and rounds 1 - lr wd to the
    weight's precision in between: k = 1/2, or 3/2. Moment, root and quotient of the update itself are computed in the
    precision of the optimizer's state, the weight's own: 3 eps of the parts.
    """
    excess = -1.0
    for name in model.stepped:
        group = model.group(name)
        decoupled = group["weight_decay"] and group.get("decoupled_weight_decay", False)
        before, after = step.before.weights[name], step.after[name]
        larger = torch.maximum(before.abs(), after.abs())
        ulp = torch.nextafter(larger, torch.full_like(larger, float("inf"))).double() - larger.double()
        parts = sum(p[name].double().abs() for c, p in step.update.parts.items() if c != "rounding" and name in p)
        bound = (1.5 if decoupled else 0.5) * ulp + 3 * torch.finfo(before.dtype).eps * parts
        rounding = step.update.parts["rounding"][name].double().abs()
        excess = max(excess, float(((rounding - bound) / bound).max()))
    return excess
