"""What the exact token kernel costs: `token_kernel` against the other ways to the same numbers, in one run.

    python analysis/kernel_cost.py --out analysis/results/kernel_cost.md     # CPU, one thread, about 15 minutes
    python analysis/kernel_cost.py --device cuda --rounds 5
    python analysis/kernel_cost.py --quick                                   # tiny models, seconds: does it run?

One probe and one training response, random weights and tokens, float32, tied Llamas of two sizes. Every way gives the
same table of 32 probe tokens by 32 training tokens over all parameters (checked once per size):

- forward+backward: the floor and the unit, one training step's worth of gradients of both sequences in one batch;
- token_kernel: this package;
- vmap(jacrev): the PyTorch NTK tutorial, the per-token Jacobian of both sequences by `functional_call`, contracted
  parameter by parameter ("NTKs with functional transforms", method 1);
- backward per token: one `torch.autograd.grad` per token, flattened; the training side's are kept as one matrix, and
  each probe token's multiplied with it;
- JVP per token: one gradient per training token, then its tangent through the probe by `torch.autograd.forward_ad`.

At T = 256 and 1024 (32 response tokens behind a long prompt) only the ways that fit into time and memory run. What is
left out: sums over many responses, where one backward or one JVP does (one-sided sums need no table).

Ways are interleaved (one of each per round); medians. Time is CPU seconds of the process on a CPU, since neighbours on
a shared machine stretch wall time (with `--threads 2` or more it counts the spinning of idle threads, too), and wall
seconds on a GPU. The check of the model by `split_model` is done once, outside. Peak memory is that of tensors beyond
the model, from torch's own profiler on the CPU (the largest sum of live allocations) and
`torch.cuda.max_memory_allocated` on a GPU. A way whose matrices of gradients do not fit into free memory is left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch
from timing import peak_bytes, timed
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from llm_dynamics.kernel import token_kernel
from llm_dynamics.likelihood import split_model

FLOOR, OURS = "forward+backward", "token_kernel"
TUTORIAL, BACKWARDS, JVPS = "vmap(jacrev), the PyTorch tutorial", "one backward per token", "one JVP per token"
MEMORY_MB = 8192
"""Enough to keep one side of the longest case; with less, `token_kernel` repeats backwards of the other side."""
SIZES = {
    "tiny": {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    "small": {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4},
    "mid": {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8},
}


@dataclass(frozen=True)
class Case:
    """A model and how long its sequences are."""

    size: str
    tokens: int
    response: int
    ways: tuple[str, ...]


def main() -> None:
    """Measure all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    every = (FLOOR, OURS, TUTORIAL, BACKWARDS, JVPS)
    cases = [
        Case("small", 64, 32, every),
        Case("mid", 64, 8, every),
        Case("mid", 64, 32, every),
        Case("small", 256, 32, (FLOOR, OURS, BACKWARDS, JVPS)),
        Case("mid", 256, 32, (FLOOR, OURS)),
        Case("small", 1024, 32, (FLOOR, OURS)),
        Case("mid", 1024, 32, (FLOOR, OURS)),
    ]
    if options.quick:
        options.rounds = 1
        cases = [Case("tiny", 16, 4, every), Case("tiny", 32, 4, (FLOOR, OURS))]
    hardware = torch.cuda.get_device_name() if options.device == "cuda" else "2 CPU cores"
    unit = "wall seconds" if options.device == "cuda" else "CPU seconds"
    lines = [
        "# What the exact token kernel costs",
        "",
        f"`python analysis/kernel_cost.py --device {options.device} --rounds {options.rounds} --threads "
        f"{options.threads}`; hardware: {hardware}, {options.threads} thread(s); float32, torch {torch.__version__}. "
        f"Times in {unit}, ways interleaved, medians of {options.rounds} (T = 1024: one round); one probe and one "
        f"training response; memory budget of token_kernel {MEMORY_MB} MB. The unit is one forward+backward of the "
        "same two sequences.",
        "",
        f"| model | T | tokens | way | {unit} | / forward+backward | / token_kernel | peak MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for case in cases:
        for row in measure(case, options):
            print(row, flush=True)
            lines.append(row)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def measure(case: Case, options: argparse.Namespace) -> list[str]:
    """Return the rows of one case."""
    job = Job(case, options.device)
    ways: dict[str, Callable[[], Tensor]] = {
        FLOOR: job.floor,
        OURS: job.ours,
        TUTORIAL: job.tutorial,
        BACKWARDS: job.backwards,
        JVPS: job.jvps,
    }
    flat = 4e-9 * case.response * job.parameters  # GB of one side's gradients
    needs = {TUTORIAL: 4 * flat, BACKWARDS: 1.3 * flat}
    room = free_gigabytes(options.device)
    left_out = [name for name in case.ways if needs.get(name, 0) > room]
    ways = {name: ways[name] for name in case.ways if name not in left_out}
    tables = {name: way() for name, way in ways.items()}  # warms up, too
    for name, table in tables.items():
        if name != FLOOR:
            torch.testing.assert_close(table, tables[OURS], rtol=0, atol=1e-4 * tables[OURS].abs().max().item())
    del tables
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds if case.tokens < 1024 else 1):
        for name, way in ways.items():
            seconds[name].append(timed(way, options.device, time.process_time))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [
        f"| {case.size}, {job.parameters / 1e6:.1f}M | {case.tokens} | {case.response} x {case.response} | {name} | "
        f"{medians[name]:.3f} | {medians[name] / medians[FLOOR]:.2f} | {medians[name] / medians[OURS]:.2f} | "
        f"{peak_bytes(way, options.device) / 1e6:.0f} |"
        for name, way in ways.items()
    ]
    start = f"| {case.size}, {job.parameters / 1e6:.1f}M | {case.tokens} | {case.response} x {case.response} |"
    return rows + [f"{start} {name} | left out: needs {needs[name]:.0f} GB | | | |" for name in left_out]


class Job:
    """One model, one probe and one training response, and every way to their kernel."""

    def __init__(self, case: Case, device: str) -> None:
        """Build the model and draw the tokens."""
        torch.manual_seed(0)
        config = LlamaConfig(
            **SIZES[case.size],
            num_attention_heads=max(4, SIZES[case.size]["hidden_size"] // 64),
            num_key_value_heads=max(2, SIZES[case.size]["hidden_size"] // 128),
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
        self.model = LlamaForCausalLM(config).to(device).eval()
        self.weights = dict(self.model.named_parameters())
        self.parameters = sum(weight.numel() for weight in self.weights.values())
        draw = torch.randint(3, config.vocab_size, (2, case.tokens))
        self.prompt = case.tokens - case.response
        self.train, self.probe = (
            SimpleNamespace(prompt_ids=row[: self.prompt], response_ids=row[self.prompt :]) for row in draw.tolist()
        )
        self.ids = draw.to(device)
        with torch.no_grad():
            self.split = split_model(self.model)

    def logps(self, ids: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        """Return the response tokens' log-probs, (B, L), with the head at their positions only."""
        inputs = {"input_ids": ids, "use_cache": False, "logits_to_keep": ids.shape[1] - self.prompt + 1}
        output = self.model(**inputs) if weights is None else functional_call(self.model, weights, (), inputs)
        logp = output.logits[:, :-1].log_softmax(-1)
        return logp.gather(2, ids[:, self.prompt :, None])[..., 0]

    def floor(self) -> Tensor:
        """Run a forward and backward of both sequences, as training would."""
        logits = self.model(input_ids=self.ids, use_cache=False).logits[:, self.prompt - 1 : -1]
        loss = -logits.log_softmax(-1).gather(2, self.ids[:, self.prompt :, None]).mean()
        loss.backward()
        self.model.zero_grad(set_to_none=True)
        return loss.detach()

    def ours(self) -> Tensor:
        """Call this package."""
        return token_kernel(self.model, [self.train], [self.probe], split=self.split, memory_budget_mb=MEMORY_MB).values

    def tutorial(self) -> Tensor:
        """Contract per-token Jacobians, parameter by parameter."""
        weights = {name: weight.detach() for name, weight in self.weights.items()}
        with sdpa_kernel(SDPBackend.MATH):
            train, probe = (jacrev(lambda w, ids=ids[None]: self.logps(ids, w)[0])(weights) for ids in self.ids)
        return sum(probe[name].flatten(1) @ train[name].flatten(1).T for name in weights).cpu()  # type: ignore[union-attr, return-value]

    def gradients(self, ids: Tensor) -> Iterator[Tensor]:
        """Yield the flat gradient of every response token, one backward each."""
        for logp in self.logps(ids[None])[0]:
            grads = torch.autograd.grad(logp, list(self.weights.values()), retain_graph=True)
            yield torch.cat([g.flatten() for g in grads])

    def backwards(self) -> Tensor:
        """Multiply the matrix of training gradients with each probe gradient."""
        train = torch.empty(self.ids.shape[1] - self.prompt, self.parameters, device=self.ids.device)
        for row, gradient in zip(train, self.gradients(self.ids[0]), strict=True):
            row.copy_(gradient)
        return torch.stack([train @ gradient for gradient in self.gradients(self.ids[1])]).cpu()

    def jvps(self) -> Tensor:
        """Carry each training token's gradient through the probe as a tangent, one at a time."""
        logps = self.logps(self.ids[:1])[0]
        columns = []
        for logp in logps:
            grads = torch.autograd.grad(logp, list(self.weights.values()), retain_graph=True)
            with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
                pairs = zip(self.weights.items(), grads, strict=True)
                duals = {name: forward_ad.make_dual(weight, g) for (name, weight), g in pairs}
                tangent = forward_ad.unpack_dual(self.logps(self.ids[1:], duals)[0]).tangent
                columns.append(tangent.clone())  # type: ignore[union-attr]
        return torch.stack(columns, dim=1).cpu()


def free_gigabytes(device: str) -> float:
    """Return how much memory is free."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] / 1e9
    return psutil.virtual_memory().available / 1e9


if __name__ == "__main__":
    main()
