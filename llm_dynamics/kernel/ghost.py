"""The tape: what each row's gradient is made of, from one forward and batched backwards without weight gradients."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm_dynamics.kernel.head_rows import HeadRows, meet_head
from llm_dynamics.kernel.layers import Dense, Form, concatenate
from llm_dynamics.kernel.output_head import OutputHead, output_head
from llm_dynamics.kernel.parameters import Rules, verify_rules
from llm_dynamics.kernel.plan import Pass, Sizes
from llm_dynamics.kernel.recording import Call, batched_grad, factors_of, lookup_of, recording, widths
from llm_dynamics.kernel.rows import ResponseRows
from llm_dynamics.kernel.weights import PaddingRows
from llm_dynamics.likelihood.head import SplitModel
from llm_dynamics.likelihood.packing import single_row
from llm_dynamics.likelihood.preserve import keeping_rope

REST = "(materialised)"
"""Key of all parameters without a rule, side by side."""
_SAME = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True)
class Tape:
    """The gradients of R rows.

    Attributes:
        rows: Their numbers in the kernel, (R,), int64.
        forms: By parameter.
        head: Their tokens at the head, where its closed form holds.
    """

    rows: Tensor
    forms: dict[str, Form]
    head: HeadRows | None


class Ghost:
    """Makes tapes of one model.

    Attributes:
        split: The model's halves.
        rules: By which rule each parameter is taken.
        head: The head in closed form, or None where it stays in the graph.
        sizes: What positions and rows take.
    """

    def __init__(self, split: SplitModel, rules: Rules, chosen: dict[str, nn.Parameter], tokens: Sequence[int]) -> None:
        """Read the graph of a forward over a few tokens, and check the rules with it.

        Args:
            split: The model's halves.
            rules: The rules assigned by ownership.
            chosen: The chosen parameters by name, the only ones that require a gradient.
            tokens: Any token ids, at least two.

        Raises:
            ValueError: Where no chosen parameter reaches the log-probs.
        """
        self.split = split
        self.rules = rules
        self.head: OutputHead | None = output_head(split) if rules.closed_head else None
        self._met: dict[ResponseRows, tuple[HeadRows, Tensor, Tensor]] = {}
        with recording(self.rules.hooked) as calls, torch.enable_grad():
            outputs = self._outputs(tokens)
        if self.passes_backbone and not outputs.requires_grad:
            raise ValueError(
                f"none of the chosen parameters reaches the log-probs, such as {next(iter(chosen))}: are they adapters "
                "that are merged or turned off?"
            )
        counts = {module: len(made) for module, made in calls.items()}
        self.rules = verify_rules(rules, chosen, outputs, counts)
        self.sizes = self._sizes(counts, outputs)
        self._truncates = self.head is not None and not self._looks_ahead(tokens, outputs.detach())

    @property
    def passes_backbone(self) -> bool:
        """Whether any parameter needs a backward through the backbone."""
        return bool(self.rules.linear or self.rules.lookup or self.rules.dense)

    def may_truncate(self, longest: int) -> bool:
        """Tell whether prefixes of sequences up to `longest` tokens may stand for the sequences.

        Not where the model was seen to look ahead, nor past the length from which rotary frequencies depend on it.
        """
        limit = self.split.rope_limit
        return self._truncates and (limit is None or longest <= limit)

    def met(self, source: ResponseRows) -> HeadRows:
        """Return the tokens of all rows of a response at the head."""
        return self._meet(source, None)[0]

    def pads(self, source: ResponseRows) -> bool:
        """Tell whether a response holds a token whose embedding gets no gradient in training."""
        modules = [module for module in self.split.model.modules() if isinstance(module, nn.Embedding)]
        return any(module.padding_idx in source.ids for module in modules)

    def tape(self, one: Pass, materialised: frozenset[str], *, trained: bool) -> Tape:
        """Run a pass: one forward, then one batched backward per batch of rows.

        Args:
            one: The pass.
            materialised: Linear weights whose gradients are formed.
            trained: Take gradients as autograd gives them in training, without the padding token's embedding; else the
                derivative of the log-probs.

        Returns:
            The tape of all of its rows.
        """
        rows_of_padding = nullcontext() if trained else PaddingRows(learn=True)
        with recording(self.rules.hooked) as calls, torch.enable_grad(), rows_of_padding:
            outputs = self._outputs(one.source.ids[: one.length])
            if self.head is None:
                outputs = self._row_logps(one.source, outputs)
        for call in (call for made in calls.values() for call in made):
            call.check()
        edges = [call.output for made in calls.values() for call in made]
        batches: list[dict[str, Form]] = []
        for batch in one.batches:
            cotangents = self._cotangents(one.source, batch, outputs)
            grads = batched_grad(outputs, [*edges, *self.rules.dense.values()], cotangents)
            batches.append(self._forms(calls, grads, len(batch), outputs.shape[0], materialised, trained))
        # one form of many rows: products of few rows with few are bound by memory, not by arithmetic
        forms = {name: concatenate([batch.pop(name) for batch in batches]) for name in list(batches[0])}
        rows = [row for batch in one.batches for row in batch]
        head = None if self.head is None else self._meet(one.source, outputs.detach())[0].of(rows)
        return Tape(torch.tensor(rows) + one.source.first, forms, head)

    def _outputs(self, ids: Sequence[int]) -> Tensor:
        """Run over T ids: hidden states (T, d) where the backbone is known, else logits (T, V)."""
        rows = single_row(list(ids))
        limit = self.split.rope_limit
        keeping = keeping_rope(self.split.model) if limit is not None and len(ids) > limit else nullcontext()
        device = self.split.device.type
        # fused attention has no rule for batched backwards
        with keeping, sdpa_kernel(SDPBackend.MATH), torch.autocast(device, enabled=False):
            return (self.split.logits(rows) if self.split.backbone is None else self.split.hidden_states(rows))[0]

    def _row_logps(self, source: ResponseRows, outputs: Tensor) -> Tensor:
        """Return each row's summed log-prob (R,) with the head inside the graph."""
        positions, labels, weights, row = _tokens(source, outputs)
        states = outputs[positions]
        logits = states if self.split.backbone is None else self.split.head(states)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logp = logits.log_softmax(-1).gather(1, labels[:, None].to(logits.device))[:, 0]
        summed = logp.new_zeros(len(source.spans))
        return summed.index_add(0, row.to(logp.device), logp * weights.to(logp))

    def _meet(self, source: ResponseRows, outputs: Tensor | None) -> tuple[HeadRows, Tensor, Tensor]:
        assert self.head is not None, "only a closed head is met outside the graph"
        if source not in self._met:
            last = source.prompt_length + max(stop for _, stop in source.spans) - 1
            with torch.no_grad():
                if outputs is None or len(outputs) < last:
                    outputs = self._outputs(source.ids)
                positions, labels, weights, row = _tokens(source, outputs)
                on_head = self.head.weight.device
                tokens = [x.to(on_head) for x in (outputs[positions], labels, weights.to(self.head.dtype), row)]
                self._met[source] = (*meet_head(self.head, *tokens), positions)
        return self._met[source]

    def _looks_ahead(self, tokens: Sequence[int], whole: Tensor) -> bool:
        with torch.no_grad():
            half = self._outputs(tokens[: (len(tokens) + 1) // 2])
        tolerance = _SAME.get(whole.dtype, 0.1) * whole.abs().max()
        return not bool(((whole[: len(half)] - half).abs() <= tolerance).all())

    def _cotangents(self, source: ResponseRows, batch: tuple[int, ...], outputs: Tensor) -> Tensor:
        if self.head is None:
            return torch.eye(len(source.spans), dtype=outputs.dtype, device=outputs.device)[list(batch)]
        tokens, back, positions = self._meet(source, outputs.detach())
        cotangents = outputs.new_zeros(len(batch), *outputs.shape)
        for i, row in enumerate(batch):
            mine = tokens.row == row
            cotangents[i].index_add_(0, positions[mine.to(positions.device)], back[mine].to(cotangents))
        return cotangents

    def _forms(
        self,
        calls: dict[nn.Module, list[Call]],
        grads: Sequence[Tensor | None],
        rows: int,
        length: int,
        materialised: frozenset[str],
        trained: bool,
    ) -> dict[str, Form]:
        places = iter(grads)
        taken = {module: [(call, next(places)) for call in made] for module, made in calls.items()}
        forms: dict[str, Form] = {}
        for name, users in self.rules.linear.items():
            made = [(call, g) for module in dict.fromkeys(users) for call, g in taken.get(module, []) if g is not None]
            factors = factors_of(made, users[0], rows, length)
            forms[name] = factors.dense() if name in materialised else factors
        for name, scaled in self.rules.lookup.items():
            looked_up = [
                (call, g, scale)
                for module, scale in dict(scaled).items()
                for call, g in taken.get(module, [])
                if g is not None
            ]
            forms[name] = lookup_of(looked_up, scaled[0][0].get_parameter("weight"), rows, trained=trained)
        if self.rules.dense:
            parts = [
                p.new_zeros(rows, p.numel()) if g is None else g.reshape(rows, -1)
                for p, g in zip(self.rules.dense.values(), places, strict=True)
            ]
            forms[REST] = Dense(torch.cat([part.to(parts[0].device) for part in parts], dim=1))
        return forms

    def _sizes(self, counts: dict[nn.Module, int], outputs: Tensor) -> Sizes:
        linear = {}
        for name, users in self.rules.linear.items():
            d_in, d_out = widths(users[0])
            linear[name] = (d_in, d_out, max(1, sum(counts.get(module, 0) for module in dict.fromkeys(users))))
        tables = [
            module.get_parameter("weight").shape[1] for users in self.rules.lookup.values() for module, _ in users
        ]
        config = self.split.model.config.get_text_config()  # type: ignore[union-attr, operator]
        return Sizes(
            linear=linear,
            lookup_width=sum(tables),
            dense=sum(parameter.numel() for parameter in self.rules.dense.values()),
            widest=max(
                [
                    *(d_out for _, d_out, _ in linear.values()),
                    outputs.shape[-1],
                    getattr(config, "intermediate_size", None) or 0,
                ]
            ),
            heads=int(getattr(config, "num_attention_heads", None) or 1),
            itemsize=max(4, outputs.element_size()),
            device=outputs.device.type,
        )


def _tokens(source: ResponseRows, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return position, label, weight and row number of every token of every row of a response."""
    flat = [(j, row) for row, (start, stop) in enumerate(source.spans) for j in range(start, stop)]
    token, row = torch.tensor(flat, device=like.device).T
    ids = torch.tensor(source.ids, device=like.device)
    weights = torch.tensor(source.weights, dtype=torch.float64, device=like.device)
    return token + source.prompt_length - 1, ids[token + source.prompt_length], weights[token], row
