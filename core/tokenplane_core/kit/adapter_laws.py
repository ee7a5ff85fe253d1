"""Laws of LoRA adapters: each row is computed with its own, whoever shares the batch, the cache or the index."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from collections.abc import Sequence as Rows
from pathlib import Path
from typing import Any

from ..backend.errors import UnsupportedAdapter
from .adapters import MODEL_TYPES, write_adapter
from .runner import LocalEngine
from .subject import NotApplicable, Subject, law, same

_RANKS = (2, 8, 5)
"""Of the three adapters; the second has the largest that there is room for."""
_NUM_TOKENS = 10


@law
def adapters_are_right(subject: Subject) -> None:
    """Text with an adapter is another than without, and that of a plain computation with the adapter merged."""
    with _adapters(subject) as folders, _engine(subject) as engine:
        prompts = subject.prompts(4, seed=30)
        plain = engine.generate(prompts, _NUM_TOKENS)
        for folder in folders:
            texts = engine.generate(prompts, _NUM_TOKENS, adapters=[engine.load_adapter(folder)] * len(prompts))
            assert texts != plain, f"{folder.name} changes nothing"
            if subject.adapter_reference is not None:
                expected = [subject.adapter_reference(folder, prompt, _NUM_TOKENS) for prompt in prompts]
                same(texts, expected, f"compared with {folder.name} merged into the weights")
        same(engine.generate(prompts, _NUM_TOKENS), plain, "without an adapter, while three are loaded")
    if subject.adapter_reference is None:
        raise NotApplicable("no reference for this model (or for a dtype below float32)")


@law
def adapters_do_not_mix(subject: Subject) -> None:
    """Rows of three adapters and of none, in one batch, in chunks, preempted: each gives what it gives alone."""
    prompts = subject.prompts(9, seed=31, longest=120)
    which = [i % 4 for i in range(len(prompts))]
    circumstances: list[tuple[str, dict[str, Any]]] = [
        ("in one batch", {}),
        ("with preemption", {"kv_cache_tokens": 256}),
        ("in chunks", {"max_step_tokens": 16}),
    ]
    with _adapters(subject) as folders:
        alone = _alone(subject, prompts, [None, *folders] * 3, _NUM_TOKENS)
        for circumstance, options in circumstances:
            with _engine(subject, **options) as engine:
                numbers = [0, *map(engine.load_adapter, folders)]
                texts = engine.generate(prompts, _NUM_TOKENS, adapters=[numbers[i] for i in which])
                same(texts, alone, f"rows of several adapters {circumstance}")


@law
def adapters_share_no_prefixes(subject: Subject) -> None:
    """What one adapter left in the prefix cache serves no other, nor the model itself; its own rows find it."""
    with _adapters(subject) as folders, _engine(subject) as engine:
        size = engine.engine.layout.block_tokens
        if not engine.engine.pool.prefix_cache:
            raise NotApplicable('kv.kind is "slot": a line cannot be shared')
        if size + 16 > subject.model.max_model_tokens:
            raise NotApplicable(f"max_model_tokens holds no block of {size} and more")
        prompt = [i * 7 % 83 for i in range(size + 5)]
        numbers = [engine.load_adapter(folders[0]), 0, engine.load_adapter(folders[1])]
        first = [_run(engine, prompt, number) for number in numbers]
        again = [_run(engine, prompt, number) for number in numbers]
        for (_, cached), (_, cached_again) in zip(first, again, strict=True):
            assert cached == 0, f"{cached} tokens came from the cache that another adapter had filled"
            assert cached_again >= size, "an adapter does not find what it has left in the cache itself"
        same([text for text, _ in again], [text for text, _ in first], "with a prefix hit")
        with _engine(subject, prefix_cache=False) as plain:
            uncached = [plain.load_adapter(folders[0]), 0, plain.load_adapter(folders[1])]
            expected = [plain.generate([prompt], _NUM_TOKENS, adapters=[number])[0] for number in uncached]
        same([text for text, _ in first], expected, "after others with the same prompt")
        # The same place on the device, another adapter.
        engine.unload_adapter(numbers[0])
        text, cached = _run(engine, prompt, engine.load_adapter(folders[1]))
        assert cached == 0, "an adapter found what another had left that was unloaded before it came"
        same([text], [expected[2]], "under the index of an adapter that was unloaded")


@law
def adapters_come_and_go(subject: Subject) -> None:
    """Loading, unloading and refusing adapters disturbs none that runs; who runs with one keeps it to the end."""
    prompts = subject.prompts(4, seed=33, longest=40)
    with _adapters(subject) as folders, _engine(subject, max_adapters=2) as engine:
        texts = _alone(subject, prompts, [None, *folders], 24)
        first, second = map(engine.load_adapter, folders[:2])
        ids = [engine.submit(prompts[0], 24), engine.submit(prompts[1], 12, adapter=first)]
        ids.append(engine.submit(prompts[2], 24, adapter=second))
        _steps(engine, 4)
        _refused(engine, folders[2])
        engine.unload_adapter(first)
        _steps(engine, 2)
        late = engine.submit(prompts[1], 4, adapter=first)
        _steps(engine, 1)
        assert engine.outcomes[late].error, "an adapter that is being unloaded took a new request"
        assert engine.engine.stats.adapters_loaded == 2, "an adapter was dropped that a running row needs"
        while engine.outcomes[ids[1]].finish_reason is None:
            engine.step()
        _steps(engine, 2)
        assert engine.engine.stats.adapters_loaded == 1, "an adapter is held that nobody can use"
        assert not engine.is_idle, "nothing runs any more: the law has lost its subject"
        ids.append(engine.submit(prompts[3], 24, adapter=engine.load_adapter(folders[2])))
        engine.run()
        texts[1] = texts[1][:12]
        same([engine.outcomes[i].token_ids for i in ids], texts, "while others were loaded and unloaded")


def _refused(engine: LocalEngine, folder: Path) -> None:
    """Where there is no room for another."""
    try:
        engine.load_adapter(folder)
    except UnsupportedAdapter:
        return
    raise AssertionError("an adapter was loaded for which there is no room")


def _alone(subject: Subject, prompts: list[list[int]], folders: Rows[Path | None], num_tokens: int) -> list[list[int]]:
    """Each prompt alone, with the one adapter that is loaded then; there may be more folders than prompts."""
    texts = []
    with _engine(subject, prefix_cache=False, async_depth=0) as engine:
        for prompt, folder in zip(prompts, folders, strict=False):
            number = engine.load_adapter(folder) if folder is not None else 0
            texts += engine.generate([prompt], num_tokens, adapters=[number])
            engine.unload_adapter(number)
    return texts


@contextlib.contextmanager
def _engine(subject: Subject, max_adapters: int = 3, **options: Any) -> Iterator[LocalEngine]:
    engine = subject.engine(max_adapters=max_adapters, max_adapter_rank=max(_RANKS), **options)
    try:
        if engine.capabilities.adapters is None:
            raise NotApplicable("adapters is None")
        yield engine
    finally:
        engine.close()


@contextlib.contextmanager
def _adapters(subject: Subject) -> Iterator[list[Path]]:
    """Folders of three adapters, as long as it lasts."""
    if subject.model.config.get("model_type") not in MODEL_TYPES:
        raise NotApplicable(f"the kit writes adapters for {', '.join(MODEL_TYPES)} alone")
    with tempfile.TemporaryDirectory() as scratch:
        yield [
            write_adapter(Path(scratch) / f"adapter-{i}", subject.model, seed=40 + i, rank=rank)
            for i, rank in enumerate(_RANKS)
        ]


def _run(engine: LocalEngine, prompt: list[int], adapter: int) -> tuple[list[int], int]:
    """Text, and how many prompt tokens came from the cache."""
    request_id = engine.submit(prompt, _NUM_TOKENS, adapter=adapter)
    engine.run()
    outcome = engine.outcomes[request_id]
    assert not outcome.error, outcome.error
    return outcome.token_ids, outcome.num_cached_tokens


def _steps(engine: LocalEngine, count: int) -> None:
    for _ in range(count):
        engine.step()
