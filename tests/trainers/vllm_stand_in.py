"""What TRL's vLLM backend talks to, replaced by a tiny model: TRL's own `VLLMGeneration` runs, without vllm installed.

vLLM holds weights of its own, which the trainer must send, samples with random numbers of its own, and reports the
log-probs that it sampled with. So does `Engine`; `install` puts it behind `vllm.LLM` (colocate) and behind TRL's client
of a server.
"""

import math
import os
from types import SimpleNamespace

import torch
from trl.generation import vllm_generation

from tests.trainers.runs import tiny_model

ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What colocate mode writes to the environment, where later tests would read it."""


class Engine:
    """A policy that generates, apart from the one that is trained.

    Args:
        sharpness: Factor on its logits: other than 1, its log-probs are not the policy's.
        tokens: It answers with these alone, so that responses share many.
        unscored: Places (completion, position) of each generation whose log-prob is NaN.
        model: Its architecture; its weights are NaN until the trainer sends some.
    """

    def __init__(self, sharpness=1.0, tokens=range(20, 30), unscored=(), model=None):
        self.model = (tiny_model() if model is None else model).eval()
        self.sharpness, self.tokens, self.unscored = sharpness, list(tokens), set(unscored)
        self.draw = torch.Generator().manual_seed(0)
        self.received = []
        """Names of the weights in the order that they came."""
        self.logps = []
        """The log-probs of each generation, by completion."""
        self.params = []
        """The sampling parameters of each generation."""
        self.forget()

    def forget(self):
        """Lose all weights, as vLLM's second level of sleep does."""
        for weight in self.model.parameters():
            weight.data.fill_(math.nan)

    def load(self, weights):
        """Take weights by name; tied ones come once."""
        mine = dict(self.model.named_parameters())
        for name, value in weights:
            mine[name].data.copy_(value)
            self.received.append(name)

    @torch.no_grad()
    def complete(self, prompts, n, temperature, max_tokens, **others):
        """Sample n completions of each prompt, prompt by prompt: their ids and log-probs. Some are cut short."""
        self.params.append({"n": n, "temperature": temperature, "max_tokens": max_tokens, **others})
        assert all(bool(weight.isfinite().all()) for weight in self.model.parameters()), (
            "generates before it has weights"
        )
        ids, logps = [], []
        for prompt in (prompt for prompt in prompts for _ in range(n)):
            made, scores = [], []
            length = 1 + int(torch.randint(max_tokens, (), generator=self.draw))
            while len(made) < length:
                logits = self.model(torch.tensor([[*prompt, *made]]), use_cache=False).logits[0, -1]
                logp = (logits * self.sharpness / temperature).log_softmax(-1)
                made.append(self.tokens[int(torch.multinomial(logp[self.tokens].exp(), 1, generator=self.draw))])
                unscored = (len(ids), len(scores)) in self.unscored
                scores.append(math.nan if unscored else float(logp[made[-1]]))
            ids.append(made)
            logps.append(scores)
        self.logps.append(logps)
        return ids, logps


class LLM:
    """`vllm.LLM`, as far as TRL uses it."""

    engine: Engine

    def __init__(self, *, model, max_num_seqs, enable_sleep_mode, **options):
        self.engine = self.engine  # that of now: it outlives the patch
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.engine.load))
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=executor, model_config=SimpleNamespace(max_model_len=512))
        self.options = {"logprobs_mode": options["logprobs_mode"], "max_num_seqs": max_num_seqs}
        self.sleeps = enable_sleep_mode

    def generate(self, prompts, sampling_params, use_tqdm):
        """One `RequestOutput` a prompt."""
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        wanted = dict(vars(sampling_params))
        completions, logps = self.engine.complete(ids, **wanted)
        n = wanted["n"]
        made = [
            SimpleNamespace(
                token_ids=tokens,
                logprobs=[
                    {token: SimpleNamespace(logprob=value, rank=1)} for token, value in zip(tokens, scores, strict=True)
                ],
            )
            for tokens, scores in zip(completions, logps, strict=True)
        ]
        return [
            SimpleNamespace(prompt_token_ids=prompt, outputs=made[i * n : (i + 1) * n]) for i, prompt in enumerate(ids)
        ]

    def reset_prefix_cache(self):
        """Forget cached prompts: none are cached."""

    def sleep(self, level):
        """Free the memory."""
        assert self.sleeps
        assert level == 2
        self.engine.forget()

    def wake_up(self, tags):
        """Take memory again."""
        assert self.sleeps


class Client:
    """`trl.generation.vllm_client.VLLMClient`, as far as `VLLMGeneration` uses it; without a server."""

    engine: Engine

    def __init__(self, base_url, group_port, connection_timeout):
        self.engine = self.engine  # as above
        self.base_url = base_url

    def init_communicator(self, device):
        """Connect to the server."""

    def get_server_info(self):
        """How the server was started."""
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata, named_params):
        """Send weights, as announced."""
        before = len(self.engine.received)
        self.engine.load(named_params)  # one by one: adapters are merged while they are streamed, and no longer
        assert self.engine.received[before:] == [name for name, _, _ in metadata]

    def reset_prefix_cache(self):
        """Forget cached prompts: none are cached."""

    def generate(self, prompts, features, structured_outputs_regex, generation_kwargs, **params):
        """n completions of each prompt, prompt by prompt."""
        assert features is None
        completions, logps = self.engine.complete(prompts, **params)
        values = [[[None if math.isnan(value) else value] for value in scores] for scores in logps]
        tokens = [[[token] for token in made] for made in completions]
        return {
            "prompt_ids": prompts, "completion_ids": completions, "logprobs": values, "logprob_token_ids": tokens,
        }  # fmt: skip


def install(monkeypatch, engine):
    """Let TRL find a vLLM, whose engine is `engine`, until the test ends."""
    for name in ENVIRONMENT:  # restored at the end, whatever is written meanwhile
        there = name in os.environ
        monkeypatch.setenv(name, os.environ.get(name, ""))
        if not there:
            monkeypatch.delenv(name)
    monkeypatch.setattr(LLM, "engine", engine, raising=False)
    monkeypatch.setattr(Client, "engine", engine, raising=False)
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda *_, **__: True)
    monkeypatch.setattr(vllm_generation, "LLM", LLM, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
    monkeypatch.setattr(vllm_generation, "VLLMClient", Client)
    return engine
