"""Laws of the text: right for a model that numpy can compute, and the same in all circumstances.

Most run the core's own engine over the plugin, twice in different circumstances, and demand the same text. Which
text is right, only `text_is_right` says; a backend's own tests compare real models.
"""

from __future__ import annotations

import random

from ..backend.plugins import Backend
from ..messages import SamplingParams
from .subject import NotApplicable, Subject, law, same, singly


@law
def text_is_right(subject: Subject) -> None:
    """Greedy text equals a plain computation without cache, for short prompts and for one that fills the context."""
    if subject.reference is None:
        raise NotApplicable("no reference for this model (or for a dtype below float32)")
    longest = subject.model.max_model_tokens - 8
    prompts = [*subject.prompts(4, seed=12), *([i * step % 83 for i in range(longest)] for step in (7, 11))]
    engine = subject.engine()
    capacity = engine.engine.pool.num_total * engine.engine.layout.block_tokens
    prompts = [prompt for prompt in prompts if len(prompt) + 8 <= capacity]
    same(engine.generate(prompts, 8), [subject.reference(p, 8) for p in prompts], "compared with the reference")
    engine.close()


@law
def batch_equals_singles(subject: Subject) -> None:
    """Prompts of mixed length, run together, give what each gives alone."""
    prompts = subject.prompts(9)
    engine = subject.engine()
    same(engine.generate(prompts, 12), singly(subject, prompts, 12), "in a batch")
    engine.close()


@law
def decode_equals_prefill(subject: Subject) -> None:
    """Every token that decoding gave is the token a prefill of all before it gives."""
    engine = subject.engine(prefix_cache=False)
    # Two prompts whose texts cross into new blocks together, whatever the block size: one alone would not notice
    # that its new block is the padding block.
    boundary = min(engine.engine.layout.block_tokens, subject.model.max_model_tokens - 20)
    crossing = [[i % base for i in range(max(boundary - 9, 1))] for base in (5, 7)]
    prompts = [*subject.prompts(3, seed=10, longest=40), *crossing]
    texts = engine.generate(prompts, 20)
    for k in (1, 2, 7, 18, 19):
        longer = [prompt + text[:k] for prompt, text in zip(prompts, texts, strict=True)]
        same(
            engine.generate(longer, 1),
            [text[k : k + 1] for text in texts],
            f"prefilled instead of decoded ({k} tokens)",
        )
    engine.close()


@law
def chunked_prefill_equals_whole(subject: Subject) -> None:
    """A prompt computed in pieces gives what it gives in one go."""
    prompts = subject.prompts(5, seed=1, longest=200)
    whole = singly(subject, prompts, 8)
    for max_step_tokens in (16, 48):
        engine = subject.engine(max_step_tokens=max_step_tokens)
        if engine.capabilities.limits.chunk_tokens == 0:
            raise NotApplicable("limits.chunk_tokens is 0: prompts are never split")
        same(engine.generate(prompts, 8), whole, f"in steps of {engine.capabilities.limits.max_step_tokens} tokens")
        engine.close()


@law
def prefix_hit_equals_recompute(subject: Subject) -> None:
    """Tokens found in the cache serve as well as tokens computed anew, from prompts and from generated text."""
    engine = subject.engine()
    if not engine.engine.pool.prefix_cache:
        raise NotApplicable('kv.kind is "slot": a line cannot be shared')
    size = engine.engine.layout.block_tokens
    if 2 * size + 16 > subject.model.max_model_tokens:
        raise NotApplicable(f"max_model_tokens holds no two blocks of {size}")
    rng = random.Random(2)
    first = [rng.randrange(subject.model.vocab_size) for _ in range(size + 3)]
    text = engine.generate([first], size)[0]
    follow_up = first + text + [1]
    prompts = [first, follow_up]
    ids = [engine.submit(prompt, 8) for prompt in prompts]
    engine.run()
    hits = [engine.outcomes[i].num_cached_tokens for i in ids]
    assert hits[0] >= size and hits[1] >= 2 * size, f"expected hits of {size} and {2 * size} tokens, got {hits}"
    same([engine.outcomes[i].token_ids for i in ids], singly(subject, prompts, 8), "with a prefix hit")
    engine.close()


@law
def preempted_equals_uninterrupted(subject: Subject) -> None:
    """Sequences thrown out for lack of blocks and recomputed go on as if nothing had happened."""
    probe = subject.engine()
    if probe.capabilities.kv.kind == "slot":
        raise NotApplicable('kv.kind is "slot": a line never runs out of blocks')
    size, longest = probe.engine.layout.block_tokens, subject.model.max_model_tokens
    probe.close()
    # Prompts of just under a block that each grow into their second, in a cache of five: while some come back, others
    # begin, and take the blocks that these had before.
    rng = random.Random(3)
    prompts = [[i] * max(1, size - rng.randint(1, 8)) for i in range(3, 13)]
    wanted = [min(rng.randint(4, 20), longest - size) for _ in prompts]
    # Among a few ids the counts decide: a resumed sequence must still know which of its tokens it generated.
    counting = SamplingParams(frequency_penalty=1.0, logit_bias=dict.fromkeys(range(3, 8), 1000.0))
    for name, sampling in (("", None), (" with penalties", counting)):
        # Without the prefix index a resumed sequence finds nothing of what it had, with it nearly all.
        engine = subject.engine(kv_cache_tokens=5 * size, prefix_cache=sampling is not None, reshuffle=True)
        ids = [engine.submit(prompt, n, sampling) for prompt, n in zip(prompts, wanted, strict=True)]
        engine.run()
        assert engine.engine.stats.requests_preempted > 0, "nothing was preempted: the law has lost its subject"
        whole = singly(subject, prompts, max(wanted), sampling)
        expected = [text[:n] for text, n in zip(whole, wanted, strict=True)]
        same([engine.outcomes[i].token_ids for i in ids], expected, f"after preemption{name}")
        engine.close()


@law
def sampled_rows_behind_unsampled(subject: Subject) -> None:
    """A prompt that ends in this step samples its own row, also where a prompt that goes on stands before it."""
    for max_step_tokens in (48, None):
        engine = subject.engine(max_step_tokens=max_step_tokens)
        limits = engine.capabilities.limits
        if limits.chunk_tokens == 0:
            raise NotApplicable("limits.chunk_tokens is 0: every prompt row samples")
        if limits.max_prefill_rows == 1:
            raise NotApplicable("limits.max_prefill_rows is 1: no prompt stands behind another")
        engine.put_unsampled_rows_first()
        longest = min(2 * limits.max_step_tokens, subject.model.max_model_tokens - 12)
        prompts = subject.prompts(6, seed=13, longest=12)
        prompts[1::2] = [(prompt * longest)[:longest] for prompt in prompts[1::2]]
        got = engine.generate(prompts, 8)
        engine.close()
        if engine.num_sampled_behind:
            same(got, singly(subject, prompts, 8), "behind rows that do not sample")
            return
    raise NotApplicable("no step holds both the end of a prompt and a piece of another")


@law
def padding_changes_nothing(subject: Subject) -> None:
    """Batches of every size up to 9 give what single rows give, and so do two rows in any bucket that holds them."""
    engine = subject.engine(prefix_cache=False)
    buckets = engine.capabilities.shapes.buckets
    if not buckets:
        raise NotApplicable("shapes.buckets is empty: nothing is ever padded")
    prompts = subject.prompts(9, seed=4)
    singles = singly(subject, prompts, 5)
    for count in range(2, 10):
        same(engine.generate(prompts[:count], 5), singles[:count], f"in a batch of {count}")
    short = subject.prompts(2, seed=14, longest=10)
    expected = singly(subject, short, 3)
    for bucket in buckets:
        engine.prefer(bucket)
        same(engine.generate(short, 3), expected, f"padded to {bucket}")
    engine.close()


@law
def slot_reuse_leaks_nothing(subject: Subject) -> None:
    """A sequence does not notice who had its slot and its blocks before, nor who has them now."""
    prompts = subject.prompts(6, seed=5)
    engine = subject.engine(max_sequences=1, prefix_cache=False)
    same([engine.generate([p], 6)[0] for p in prompts], singly(subject, prompts, 6), "in a used slot")
    engine.close()
    # Longer and longer ones, two at a time: what an earlier owner left behind now belongs to the neighbour.
    size, most = engine.engine.layout.block_tokens, subject.model.max_model_tokens // 2
    lengths = [min(length, most) for length in (3, 5, size, size + 2, 2 * size, 2 * size + 3, 2 * size + 5)]
    growing = [[(i + length) % subject.model.vocab_size for i in range(length)] for length in lengths]
    few_blocks = 6 * size if engine.capabilities.kv.kind == "paged" else None
    engine = subject.engine(max_sequences=2, kv_cache_tokens=few_blocks, prefix_cache=False, reshuffle=True)
    same(engine.generate(growing, 6), singly(subject, growing, 6), "in a used slot beside another")
    engine.close()


@law
def neighbours_do_not_disturb(subject: Subject) -> None:
    """A long sequence keeps its text while others come, finish and are cancelled around it."""
    prompts = subject.prompts(13, seed=6, longest=40)
    num_tokens = min(48, subject.model.max_model_tokens - 41)
    engine = subject.engine()
    long_id = engine.submit(prompts[0], num_tokens)
    for i, prompt in enumerate(prompts[1:]):
        short_id = engine.submit(prompt, 4)
        for _ in range(3):
            engine.step()
        if i % 3 == 0:
            engine.cancel(short_id)
    engine.run()
    same([engine.outcomes[long_id].token_ids], singly(subject, prompts[:1], num_tokens), "among changing neighbours")
    engine.close()


@law
def async_depth_changes_nothing(subject: Subject) -> None:
    """Launching a step before the last one is read back gives the same text."""
    engine = subject.engine()
    if engine.capabilities.async_depth == 0:
        raise NotApplicable("async_depth is 0")
    prompts = subject.prompts(7, seed=7)
    one_by_one = subject.engine(async_depth=0)
    same(engine.generate(prompts, 10), one_by_one.generate(prompts, 10), "at async depth 1")
    engine.close()
    one_by_one.close()


@law
def no_compile_after_warmup(subject: Subject) -> None:
    """A device of compiled shapes has compiled them all before it serves, and compiles nothing in any of them."""
    engine = subject.engine()
    shapes = engine.capabilities.shapes
    if shapes.mode != "hard":
        raise NotApplicable(f'shapes.mode is "{shapes.mode}", not "hard"')
    assert engine.num_warmed_up >= len(shapes.buckets), (
        f"warmup() compiled {engine.num_warmed_up} shapes, declared are {len(shapes.buckets)}"
    )
    for seed in range(3):
        engine.generate(subject.prompts(4 + 3 * seed, seed=seed), 4)
    one = [[1]]  # small enough for every bucket
    for bucket in shapes.buckets:
        assert engine.engine.stats.compiled_shapes == 0, "a shape was compiled while serving"
        engine.prefer(bucket)
        engine.generate(one, 2)
        assert engine.engine.stats.compiled_shapes == 0, f"{bucket} was compiled while serving"
    engine.close()


@law
def close_twice_is_fine(subject: Subject) -> None:
    """close() may be called again, and before load()."""
    engine = subject.engine()
    engine.generate(subject.prompts(1), 1)
    engine.close()
    engine.close()
    Backend(subject.name, subject.make_plugin()).close()
