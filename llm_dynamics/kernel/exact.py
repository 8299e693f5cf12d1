"""The exact token kernel: inner products of per-token gradients over all parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from llm_dynamics.kernel.ghost import Ghost, Tape
from llm_dynamics.kernel.head_rows import head_gram, join, tied_gram
from llm_dynamics.kernel.layers import Lookup, gram
from llm_dynamics.kernel.output_head import OutputHead
from llm_dynamics.kernel.parameters import ParameterChoice, assign_rules, choose_parameters
from llm_dynamics.kernel.plan import Contraction, Pass, Plan, make_plan
from llm_dynamics.kernel.rows import Coefficients, ResponseRows, RowChoice, select_rows
from llm_dynamics.kernel.table import Kind, TokenKernel
from llm_dynamics.likelihood.head import SplitModel, split_model
from llm_dynamics.likelihood.packing import TokenizedResponse
from llm_dynamics.likelihood.preserve import evaluating, keeping_trainable

DEFAULT_MEMORY_MB = 2048


def token_kernel(
    model: nn.Module,
    train: Sequence[TokenizedResponse],
    probes: Sequence[TokenizedResponse],
    *,
    parameters: ParameterChoice = None,
    train_rows: RowChoice = "tokens",
    probe_rows: RowChoice = "tokens",
    kind: Kind = "label",
    coefficients: Coefficients | None = None,
    contraction: Contraction = "auto",
    memory_budget_mb: float = DEFAULT_MEMORY_MB,
    split: SplitModel | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> TokenKernel:
    """Compute the exact token kernel (label-contracted empirical NTK) of probe and training tokens.

        T[m, l] = < d log pi(y~_m)/dtheta , d log pi(y_l)/dtheta > = e_{y~m}^T A_m K_{m,l} A_l^T e_{y_l}

    with A and K of [LD, Prop. 1] (arXiv 2407.10490); a plain gradient step of size eta on a loss with
    c_l = dL/d log pi(y_l) then moves `log pi(y~_m)` by `- eta sum_l c_l T[m, l] + O(eta^2)`. Nothing is approximated:
    every chosen parameter counts, tied ones in both roles with their cross terms.

    The left factor is the log-prob's derivative, the right one the gradient that autograd gives in training. They
    differ in the embedding of the padding token (`nn.Embedding.padding_idx`), which the log-probs depend on wherever
    that token stands in a text (as where it also ends turns), and which autograd leaves out. A head tied to the
    embeddings does get a gradient for that row and thereby moves the embedding: with such texts and a tied, trained
    head, `T` of a set with itself is not symmetric. Everywhere else it is.

    The model is evaluated without dropout, and left as it was (modes, `requires_grad`, `.grad`, hooks, random state),
    also after an error. Forward and backward run in the weights' own precision, with autocast off; inner products in
    float32 at least. With bfloat16 weights the gradients themselves carry bfloat16 noise (1e-2 relative is common):
    load the model in float32 where the numbers matter.

    The price is one backward through the backbone per row, over a prefix that ends near the row's last token; gradients
    of linear layers and embeddings are not formed but contracted from factors; norms, biases and whatever has no rule
    are materialised row by row. Where the LM head is unknown or wrapped (see `split_model`; an adapter on the head), it
    is taken through the graph: slower, with (rows, tokens, V) temporaries. Attention uses the MATH kernel; what has no
    batched backward (FlashAttention, custom kernels) is taken one row at a time.

    Args:
        model: Any Hugging Face causal LM (PEFT weight adapters, DDP and TRL's fused head included).
        train: U training responses with their prompts, both non-empty.
        probes: P probe responses.
        parameters: Which parameters the inner product runs over: names as in `model.named_parameters()`, a predicate
            of name and parameter, or None: all trainable ones. Frozen ones can be named.
        train_rows: "tokens": one column per response token. "responses": one per response, the sum over its tokens.
            Or spans: for each response a list of half-open (start, stop) in response tokens, each summed into one
            column. Cost is linear in rows.
        probe_rows: The same for the probes, giving rows.
        kind: "label", or "residual": each training token's gradient is weighted by its `coefficients`, before spans are
            summed. Columns then are the influence of the step itself.
        coefficients: c_l of every training token, (N,) or one sequence per response; for `kind="residual"` alone.
        contraction: How linear layers are contracted: "gram" (factors), "materialise" (their weight gradients are
            formed), or "auto": what takes fewer multiply-adds, layer by layer. The numbers do not depend on it.
        memory_budget_mb: Megabytes for gradients that are kept and for those in flight, besides the model, one forward
            graph and the result. Less memory costs repeated backwards, never accuracy.
        split: The model's halves from `split_model`, to save the check on repeated calls.
        on_progress: Called after every batched backward with the rows done and the rows in all.

    Returns:
        The kernel, M rows of probes by L columns of training, on the CPU.

    Raises:
        ValueError: For empty input, unknown names, spans or coefficients that do not fit, or a budget that cannot hold
            one row.
        NotImplementedError: For models that cannot be split (`split_model`), and sharded or quantised parameters.

    Example:
        >>> kernel = token_kernel(model, train, probes)  # doctest: +SKIP
        >>> kernel.frame(probe=0, train=2)  # doctest: +SKIP
    """
    _check(kind, coefficients, contraction, memory_budget_mb)
    with torch.inference_mode(False), evaluating(model), keeping_trainable(model):
        split = split or split_model(model)
        chosen = choose_parameters(model, parameters)
        members = {id(parameter) for parameter in chosen.values()}
        for parameter in model.parameters():
            if parameter.requires_grad != (id(parameter) in members):
                parameter.requires_grad_(id(parameter) in members)  # no graph where nobody asks
        columns, train_index = select_rows(train, train_rows, split.vocab_size, side="train", coefficients=coefficients)
        rows, probe_index = select_rows(probes, probe_rows, split.vocab_size, side="probes")
        ghost = Ghost(split, assign_rules(split, chosen), chosen, columns[0].ids[:8])
        values = _values(
            ghost, columns, rows, (len(probe_index), len(train_index)), memory_budget_mb, contraction, on_progress
        )
    return TokenKernel(values, probe_index, train_index, kind, tuple(chosen))


def _check(kind: str, coefficients: Coefficients | None, contraction: str, memory_budget_mb: float) -> None:
    if kind not in ("label", "residual"):
        raise ValueError(f'kind is {kind!r}; allowed: "label", "residual"')
    if (kind == "residual") != (coefficients is not None):
        raise ValueError('coefficients belong to kind="residual", which needs them: c_l of every training token')
    if contraction not in ("auto", "gram", "materialise"):
        raise ValueError(f'contraction is {contraction!r}; allowed: "auto", "gram", "materialise"')
    if not memory_budget_mb > 0:
        raise ValueError(f"memory_budget_mb is {memory_budget_mb}; it must be positive")


def _values(
    ghost: Ghost,
    columns: Sequence[ResponseRows],
    rows: Sequence[ResponseRows],
    shape: tuple[int, int],
    memory_budget_mb: float,
    contraction: Contraction,
    on_progress: Callable[[int, int], None] | None,
) -> Tensor:
    dtype = torch.float64 if next(iter(ghost.split.model.parameters())).dtype == torch.float64 else torch.float32
    values = torch.zeros(shape, dtype=dtype)
    sources = ([s for s in columns if s.spans], [s for s in rows if s.spans])
    if ghost.passes_backbone:
        plan = make_plan(
            *sources,
            ghost.sizes,
            budget=int(memory_budget_mb * 2**20),
            contraction=contraction,
            truncate=ghost.may_truncate(max(len(s.ids) for s in (*columns, *rows))),
        )
        _fill(values if plan.keeps_train else values.T, ghost, plan, on_progress)
    if ghost.head is not None and (ghost.rules.head_weight or ghost.rules.head_bias):
        right, left = (join([ghost.met(s) for s in side], [s.first for s in side]) for side in sources)
        values += head_gram(
            ghost.head, left, right, shape, weight=ghost.rules.head_weight is not None, bias=ghost.rules.head_bias
        ).cpu()
    return values


def _fill(values: Tensor, ghost: Ghost, plan: Plan, on_progress: Callable[[int, int], None] | None) -> None:
    """Write all but the head's own part: rows are those of the side that passes by, columns those of the side kept."""
    done = 0

    def report(tape: Tape) -> None:
        nonlocal done
        done += len(tape.rows)
        if on_progress is not None:
            on_progress(done, plan.rows)

    for block in plan.blocks:
        _fill_block(values, ghost, plan, block, report)  # in a call of its own, after which its tapes are gone


def _fill_block(
    values: Tensor, ghost: Ghost, plan: Plan, block: Sequence[Pass], report: Callable[[Tape], None]
) -> None:
    kept: dict[Pass, Tape] = {}
    for one in block:
        kept[one] = ghost.tape(one, plan.materialised_kept, trained=plan.keeps_train)
        report(kept[one])
    by_response: dict[ResponseRows, list[Tape]] = {}
    for one, tape in kept.items():
        by_response.setdefault(one.source, []).append(tape)
    same_form = plan.materialised_kept == plan.materialised_stream
    for one in plan.stream:
        # a response on both sides needs one tape, unless training leaves a part of its gradient out
        known = kept.get(one) if same_form and not ghost.pads(one.source) else None
        tape = known or ghost.tape(one, plan.materialised_stream, trained=not plan.keeps_train)
        for tapes in by_response.values():
            numbers = torch.cat([other.rows for other in tapes])
            values[tape.rows[:, None], numbers] = _inner_products(tape, tapes, ghost).to(values)
        report(tape)


def _inner_products(left: Tape, rights: Sequence[Tape], ghost: Ghost) -> Tensor:
    """Return the kernel of M rows and of L rows of one response, (M, L), without the head's own part."""
    parts = [gram(form, [right.forms[name] for right in rights]) for name, form in left.forms.items()]
    tied = ghost.rules.head_weight
    if tied in left.forms and ghost.head is not None:
        parts.append(torch.cat([_cross_terms(left, right, tied, ghost.head) for right in rights], dim=1))
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total


def _cross_terms(left: Tape, right: Tape, tied: str, head: OutputHead) -> Tensor:
    """Return what a tied matrix as head of one side has to do with itself as embedding of the other, both ways."""
    table_left, table_right = left.forms[tied], right.forms[tied]
    assert isinstance(table_left, Lookup), "the rules tie the head to embeddings alone"
    assert isinstance(table_right, Lookup), "the rules tie the head to embeddings alone"
    assert left.head is not None, "a closed head is on every tape"
    assert right.head is not None, "a closed head is on every tape"
    to_right = tied_gram(head, left.head, table_right, len(left.rows))
    return to_right + tied_gram(head, right.head, table_left, len(right.rows)).T
