import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from core.ids import checkpoint_model_id, new_id, new_token, tuned_model_id


def test_ids_carry_their_prefix_and_sort_by_creation() -> None:
    ids = [new_id("ftjob") for _ in range(1000)]
    assert all(re.fullmatch(r"ftjob-[0-9a-f]{32}", value) for value in ids)
    assert ids == sorted(ids)


def test_ids_and_tokens_are_unique_across_threads() -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda _: new_id("file"), range(5000)))
        tokens = list(pool.map(lambda _: new_token(), range(5000)))
    assert len(set(ids)) == len(set(tokens)) == 5000
    assert all(re.fullmatch(r"[0-9a-f]{32}", token) for token in tokens)


@pytest.mark.parametrize(
    ("suffix", "shown"),
    [("support", "support"), (None, ""), ("", ""), ("My Model!", "My-Model"), ("a:b/c", "a-b-c"), ("../x", "x"), ("日本", ""), ("a_b-1", "a_b-1")],
)
def test_model_ids_have_five_parts_whatever_the_suffix(suffix: str | None, shown: str) -> None:
    model_id = tuned_model_id("smollm2", "default", suffix, "ftjob-0123456789abcdef")
    assert model_id == f"ft:smollm2:default:{shown}:456789abcdef"
    assert checkpoint_model_id(model_id, 50) == f"{model_id}:ckpt-step-50"


def test_model_ids_of_jobs_created_together_differ() -> None:
    assert len({tuned_model_id("m", "p", "s", new_id("ftjob")) for _ in range(1000)}) == 1000
