"""How fast is a backend, beside transformers on the same card and beside what the card can do?

Ratios of things measured in the same run: a rented card is rarely the card of the data sheet.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import transformers

from gpu.subject import SectionFailed, Size, Subject
from tokenplane_core.backend.plugins import load_plugin
from tokenplane_core.backend.records import ModelSpec
from tokenplane_core.kit.runner import LocalEngine

Prompts = list[list[int]]
Run = Callable[[Prompts, int], float]
"""Generate that many tokens after each prompt, greedily and without a stop; the seconds it took."""


# --- Ours ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Timing:
    first_token_s: list[float]  # of each request, all submitted at 0
    total_s: float


def local_engine(subject: Subject, model: ModelSpec) -> LocalEngine:
    """The engine without its process and sockets, so that the backend is measured and not the API."""
    return LocalEngine(
        lambda: load_plugin(subject.backend),
        model,
        max_sequences=subject.size.requests,
        kv_cache_tokens=subject.size.cache_tokens,
        prefix_cache=False,
        shuffle_seed=None,
    )


def serve(local: LocalEngine, prompts: Prompts, new_tokens: int) -> Timing:
    start_s = perf_counter()
    waiting = [local.submit(prompt, new_tokens) for prompt in prompts]
    outcomes = [local.outcomes[request_id] for request_id in waiting]
    first_token_s: dict[str, float] = {}
    while not local.is_idle:
        local.engine.step()
        now_s = perf_counter() - start_s
        for request_id in [request_id for request_id in waiting if local.outcomes[request_id].token_ids]:
            first_token_s[request_id] = now_s
            waiting.remove(request_id)
    total_s = perf_counter() - start_s
    for outcome in outcomes:
        if outcome.error or len(outcome.token_ids) != new_tokens:
            raise SectionFailed(f"a request got {len(outcome.token_ids)} of {new_tokens} tokens: {outcome.error}", {})
    return Timing(list(first_token_s.values()), total_s)


@contextmanager
def tokenplane(subject: Subject, model: ModelSpec, device: torch.device) -> Iterator[Run]:
    local = local_engine(subject, model)
    try:
        yield lambda prompts, new_tokens: serve(local, prompts, new_tokens).total_s
    finally:
        local.close()


# --- Peers --------------------------------------------------------------------------------------------------


def _peer_model(model: ModelSpec, device: torch.device) -> Any:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model.path, dtype=model.dtype).to(device)
    loaded.generation_config = _config(1)
    return loaded.eval()


def _config(new_tokens: int) -> transformers.GenerationConfig:
    return transformers.GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )


@contextmanager
def generate(subject: Subject, model: ModelSpec, device: torch.device) -> Iterator[Run]:
    """`generate` on one static batch: all prompts have one length, so that it pads nothing."""
    loaded = _peer_model(model, device)

    @torch.inference_mode()
    def run(prompts: Prompts, new_tokens: int) -> float:
        ids = torch.tensor(prompts, device=device)
        start_s = perf_counter()
        out = loaded.generate(ids, attention_mask=torch.ones_like(ids), generation_config=_config(new_tokens))
        out.cpu()
        seconds = perf_counter() - start_s
        assert out.shape[1] == ids.shape[1] + new_tokens
        return seconds

    yield run


@contextmanager
def continuous_batching(subject: Subject, model: ModelSpec, device: torch.device) -> Iterator[Run]:
    """transformers' continuous batching, set up and warmed up before the clock starts."""
    loaded, size = _peer_model(model, device), subject.size
    config = transformers.ContinuousBatchingConfig(
        num_blocks=size.cache_tokens // 256 + 1, max_requests_per_batch=size.requests
    )
    with loaded.continuous_batching_context_manager(
        generation_config=_config(size.new_tokens), continuous_batching_config=config
    ) as manager:

        def run(prompts: Prompts, new_tokens: int) -> float:
            start_s = perf_counter()
            waiting = set(manager.add_requests(inputs=prompts, max_new_tokens=new_tokens))
            while waiting:
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    assert not result.error and len(result.generated_tokens) == new_tokens, result
                    waiting.discard(result.request_id)
                elif result is None and not manager.is_running():
                    raise RuntimeError("its generation thread has ended")
            return perf_counter() - start_s

        yield run


CONTENDERS = {"tokenplane": tokenplane, "generate": generate, "continuous batching": continuous_batching}


def peers(subject: Subject) -> dict[str, object]:
    """Seconds for all requests at once and for one alone, and how many times faster ours are."""
    device, opened = subject.open()
    size, facts = subject.size, {}
    transformers.logging.set_verbosity_error()
    with subject.model(device) as model:
        for name, contender in CONTENDERS.items():
            try:
                with contender(subject, model, opened.torch_device) as run:
                    facts[name] = _medians(subject, run)
            except Exception as error:  # a peer may fail in any way; ours may not
                if name == "tokenplane":
                    raise
                facts[name] = {"failed": f"{type(error).__name__}: {error}"}
            gc.collect()
    ours = facts["tokenplane"]
    for name, other in facts.items():
        if name != "tokenplane" and "failed" not in other:
            other["tokenplane is faster, all"] = round(other["all_s"] / ours["all_s"], 2)
            other["tokenplane is faster, one"] = round(other["one_s"] / ours["one_s"], 2)
    return {"requests": size.requests, "prompt_tokens": size.prompt_tokens, "new_tokens": size.new_tokens, **facts}


def _medians(subject: Subject, run: Run) -> dict[str, Any]:
    size = subject.size
    work = {"all": size.requests, "one": 1}
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for round_ in range(subject.rounds + 1):  # the first one warms up
        for name, requests in work.items():
            took_s = run(subject.prompts(requests, seed=round_ * 1000 + requests), size.new_tokens)
            seconds[name] += [took_s] if round_ else []
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "all_s": round(medians["all"], 4),
        "one_s": round(medians["one"], 4),
        "tok_s": round(size.requests * size.new_tokens / medians["all"], 1),
        "ms_per_token_alone": round(medians["one"] / size.new_tokens * 1e3, 3),
    }


# --- Ceilings -----------------------------------------------------------------------------------------------


def ceilings(subject: Subject) -> dict[str, object]:
    """What a step takes, as a fraction of the bandwidth and the compute rate measured here."""
    device, opened = subject.open()
    size, dtype = subject.size, getattr(torch, device.dtypes[0])
    bytes_per_s = copy_rate(size.copy_bytes, opened.torch_device)
    flop_per_s = matmul_rate(size.matmul, dtype, opened.torch_device)
    facts: dict[str, object] = {"copy_gb_s": round(bytes_per_s / 1e9, 1), "matmul_tflop_s": round(flop_per_s / 1e12, 3)}
    with subject.model(device) as model:
        local = local_engine(subject, model)
        try:
            capabilities = local.capabilities
            facts["kernels"] = dict(capabilities.kernels)
            token_bytes = capabilities.kv.block_bytes / capabilities.kv.block_tokens
            for name, requests in (("one request", 1), ("all requests", size.requests)):
                prefill_s, step_s = _phases(subject, local, requests)
                context = requests * (size.prompt_tokens + size.new_tokens / 2)
                read_bytes = capabilities.weights_bytes + context * token_bytes
                flops = requests * prefill_flops(size, capabilities.weights_bytes // dtype.itemsize)
                facts[name] = {
                    "requests": requests,
                    "prefill_tok_s": round(requests * size.prompt_tokens / prefill_s, 1),
                    "prefill_fraction_of_compute": round(flops / prefill_s / flop_per_s, 4),
                    "decode_step_ms": round(step_s * 1e3, 3),
                    "decode_tok_s": round(requests / step_s, 1),
                    "decode_fraction_of_bandwidth": round(read_bytes / step_s / bytes_per_s, 4),
                }
        finally:
            local.close()
    return facts


def _phases(subject: Subject, local: LocalEngine, requests: int) -> tuple[float, float]:
    """Median seconds until the last prompt is computed, and for each decode step after that."""
    new_tokens, prefill_s, step_s = subject.size.new_tokens, [], []
    for round_ in range(subject.rounds + 1):  # the first one warms up
        timing = serve(local, subject.prompts(requests, seed=round_ * 1000 + requests), new_tokens)
        if round_:
            prefill_s.append(max(timing.first_token_s))
            step_s.append((timing.total_s - max(timing.first_token_s)) / (new_tokens - 1))
    return statistics.median(prefill_s), statistics.median(step_s)


def prefill_flops(size: Size, parameters: int) -> float:
    """For one prompt: every layer's products for every token, the output layer's for the last, causal attention."""
    inner = parameters - size.vocab * size.hidden
    products = 2 * (inner * size.prompt_tokens + size.vocab * size.hidden)
    return products + 2.0 * size.prompt_tokens**2 * size.heads * size.head_dim * size.layers


def copy_rate(size_bytes: int, device: torch.device) -> float:
    """Bytes read and written per second by a copy of that size."""
    source = torch.ones(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size_bytes / best_s(lambda: target.copy_(source), device)


def matmul_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a square matrix product."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / best_s(lambda: left @ right, device)


def best_s(work: Callable[[], object], device: torch.device, times: int = 20) -> float:
    """The shortest of some runs, each waited for."""
    best = float("inf")
    for _ in range(times):
        start_s = perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = min(best, perf_counter() - start_s)
    return best
