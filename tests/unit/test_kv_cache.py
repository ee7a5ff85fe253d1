"""The block pool keeps its books under any series of operations."""

from __future__ import annotations

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from tokenplane_core.backend.records import PAD_BLOCK
from tokenplane_core.engine.kv_cache import BlockKey, BlockPool

SIZE = 4


def keys_of(pool: BlockPool, token_ids: list[int]) -> list[BlockKey]:
    keys: list[BlockKey] = []
    pool.extend_keys(keys, array("i", token_ids))
    return keys


def store(pool: BlockPool, token_ids: list[int]) -> list[int]:
    """Allocate blocks for the tokens and publish the full ones."""
    blocks = pool.allocate(pool.blocks_for(len(token_ids)))
    assert blocks is not None
    for block, key in zip(blocks, keys_of(pool, token_ids), strict=False):
        pool.publish(block, key)
    return blocks


def test_a_prefix_is_found_by_content_and_only_whole_blocks() -> None:
    pool = BlockPool(10, SIZE)
    blocks = store(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert pool.match(keys_of(pool, [1, 2, 3, 4, 5, 6, 7, 8, 0])) == blocks[:2]
    assert pool.match(keys_of(pool, [1, 2, 3, 4, 5, 6, 7])) == blocks[:1]
    assert pool.match(keys_of(pool, [5, 6, 7, 8])) == []  # the same tokens behind another parent are other content


def test_released_content_survives_until_it_is_evicted_tail_first() -> None:
    pool = BlockPool(4, SIZE)
    tokens = list(range(12))
    pool.release(store(pool, tokens))
    assert len(pool.match(keys_of(pool, tokens))) == 3
    taken = pool.allocate(1)
    assert taken is not None
    assert len(pool.match(keys_of(pool, tokens))) == 2
    pool.release(taken)
    pool.check([])


def test_the_least_recently_used_content_goes_first() -> None:
    pool = BlockPool(3, SIZE)
    old, young = [1, 2, 3, 4], [5, 6, 7, 8]
    pool.release(store(pool, old))
    pool.release(store(pool, young))
    hit = pool.match(keys_of(pool, old))
    pool.share(hit)
    pool.release(hit)
    assert pool.allocate(1) is not None
    assert pool.match(keys_of(pool, old)) and not pool.match(keys_of(pool, young))


def test_without_prefix_cache_nothing_is_found() -> None:
    pool = BlockPool(4, SIZE, prefix_cache=False)
    pool.release(store(pool, [1, 2, 3, 4]))
    assert pool.match(keys_of(pool, [1, 2, 3, 4])) == []


def test_keys_differ_between_processes() -> None:
    assert keys_of(BlockPool(4, SIZE), [1, 2, 3, 4]) != keys_of(BlockPool(4, SIZE), [1, 2, 3, 4])


@given(
    operations=st.lists(
        st.tuples(st.sampled_from(["take", "drop"]), st.integers(0, 3), st.integers(1, 14)), max_size=80
    )
)
@settings(max_examples=300, deadline=None)
def test_free_plus_used_is_total_after_any_operations(operations: list[tuple[str, int, int]]) -> None:
    pool = BlockPool(9, SIZE)
    held: list[list[int]] = []
    for what, which, length in operations:
        if what == "drop" and held:
            pool.release(held.pop(which % len(held)))
        elif what == "take":
            token_ids = [which] * length
            hits = pool.match(keys_of(pool, token_ids))
            pool.share(hits)
            fresh = pool.allocate(pool.blocks_for(length) - len(hits))
            if fresh is None:
                pool.release(hits)
            else:
                held.append(hits + fresh)
                for block, key in zip(held[-1], keys_of(pool, token_ids), strict=False):
                    pool.publish(block, key)
        pool.check(held)
        assert pool.num_free + pool.num_used == pool.num_total == 8
        assert all(PAD_BLOCK not in blocks for blocks in held)
