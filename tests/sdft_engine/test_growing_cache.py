"""sdft_engine.growing_cache: holds what transformers' own cache holds."""

import torch
from transformers import DynamicCache

from sdft_engine.growing_cache import SPARE_TOKENS, GrowingCache, new_cache


@torch.no_grad()
def test_it_holds_what_was_put_in_over_many_growths_and_after_rows_left() -> None:
    generator = torch.Generator().manual_seed(0)
    mine, theirs = GrowingCache(), DynamicCache()
    rows = 4
    for turn in range(3 * SPARE_TOKENS):
        new = torch.randn(2, rows, 2, 5 if turn == 0 else 1, 8, generator=generator)
        for cache in (mine, theirs):
            found = cache.update(new[0], new[1], 0)
            if cache is mine:
                kept = found
        torch.testing.assert_close(kept, found, rtol=0, atol=0)
        if turn == 70:  # a row leaves, and with it columns that only it used
            rows = 3
            for cache in (mine, theirs):
                cache.layers[0].keys = cache.layers[0].keys[:rows, :, 2:].contiguous()
                cache.layers[0].values = cache.layers[0].values[:rows, :, 2:].contiguous()
    assert mine.get_seq_length() == theirs.get_seq_length()


@torch.no_grad()
def test_a_token_more_copies_nothing() -> None:
    cache = GrowingCache()
    cache.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 0)
    address = cache.layers[0].keys.data_ptr()
    for _ in range(SPARE_TOKENS):
        cache.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), 0)
    assert cache.layers[0].keys.data_ptr() == address
    cache.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), 0)
    assert cache.layers[0].keys.data_ptr() != address


def test_with_gradients_transformers_own_is_used() -> None:
    assert not isinstance(new_cache(), GrowingCache)
    with torch.no_grad():
        assert isinstance(new_cache(), GrowingCache)
