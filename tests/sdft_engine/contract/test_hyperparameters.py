"""The table of hyperparameters in docs/api.md, value by value, and the numbers behind every "auto"."""

from typing import Any

import pytest
from pydantic import ValidationError

from sdft_engine.contract.hyperparameters import (
    FIELDS_NOT_YET_AVAILABLE,
    NOT_YET_AVAILABLE,
    DatasetStatistics,
    SdftHyperparameters,
    SupervisedHyperparameters,
    automatic_batch_size,
    automatic_completion_tokens,
    automatic_epochs,
    automatic_learning_rate,
    resolve_sdft,
    resolve_supervised,
    total_steps_of,
)

SUPERVISED_FIELDS = {
    "n_epochs", "batch_size", "learning_rate", "learning_rate_multiplier", "lora_rank", "lora_alpha", "warmup_ratio", "checkpoint_every_steps",
    "anchor_weight",
}  # fmt: skip
SDFT_FIELDS = SUPERVISED_FIELDS | {
    "max_completion_tokens", "divergence", "jsd_beta", "estimator", "top_k", "entry_clip", "token_clip",
    "teacher", "ema_rate", "teacher_start", "temperature", "skip_first_tokens",
    "skip_after_think", "mask_clipped_completions", "weight_decay", "max_grad_norm", "over_length",
}  # fmt: skip
LATER_FIELDS = {"max_retention_drop"}

# name: (values at the edges that are accepted, values that are refused, default)
TABLE: dict[str, tuple[list[Any], list[Any], Any]] = {
    "n_epochs": ([1, 50, "auto"], [0, 51, -1, 1.5, 2.0, "3", True, None, "Auto"], "auto"),
    "batch_size": ([1, 256, "auto"], [0, 257, 1.5, "8", True, None], "auto"),
    "learning_rate": ([1e-7, 1e-2, "auto"], [0, -1e-4, 9e-8, 1.1e-2, 1, "1e-4", float("nan"), float("inf"), None, True], "auto"),
    "learning_rate_multiplier": ([0.01, 100, 1, "auto"], [0, -1, 0.009, 101, float("inf"), "1"], "auto"),
    "max_completion_tokens": ([1, 32_768, "auto"], [0, 32_769, 1.5, None], "auto"),
    "lora_rank": ([1, 256], [0, 257, "auto", 1.5, None, True], 16),
    "lora_alpha": ([1, 1024, "auto"], [0, 1025, 1.5, None, "16"], "auto"),
    "divergence": (["forward", "reverse", "jsd"], ["kl", None, 1], "forward"),
    "jsd_beta": ([0.001, 0.999], [0, 1, -0.1, float("nan"), "auto", None], 0.5),
    "estimator": (["full", "top_k"], ["half", None, 1, "sampled"], "full"),
    "top_k": ([8, 1024], [7, 1025, 8.5, "auto", None], 128),
    "entry_clip": ([0.001, 100, None], [0, -1, float("inf"), "auto", True], None),
    "token_clip": ([0.001, 100, None], [0, -1, float("nan"), "auto", True], None),
    "teacher": (["ema", "frozen", "live"], ["auto", None, True], "ema"),
    "ema_rate": ([0.001, 0.999], [0, 1, -0.1, 1.5, float("nan"), "auto"], 0.02),
    "teacher_start": (["parent", "base"], ["auto", None], "parent"),
    "temperature": ([0.1, 2, "auto"], [0, 0.09, 2.1, float("nan"), "hot"], "auto"),
    "skip_first_tokens": ([0, 32], [-1, 33, 1.5, True], 3),
    "skip_after_think": ([True, False], [1, "yes", None], False),
    "mask_clipped_completions": ([True, False, "auto"], [1, "true", None], "auto"),
    "warmup_ratio": ([0, 1, 0.5], [-0.1, 1.1, "auto", True], 0.1),
    "anchor_weight": ([0, 10, 0.5], [-0.1, 10.1, float("nan"), "auto", None, True], 0.0),
    "weight_decay": ([0, 1], [-0.1, 1.1], 0.0),
    "max_grad_norm": ([0.001, 1e6], [0, -1, float("inf"), None], 1.0),
    "checkpoint_every_steps": ([1, 10_000, "auto"], [0, 10_001, 1.5], "auto"),
    "over_length": (["reject", "drop"], ["truncate", None], "reject"),
}


def statistics(rows: int = 64, answer_tokens: list[int] | None = None, **changes: int) -> DatasetStatistics:
    given = {"hidden_size": 2048, "longest_teacher_prompt": 100, "context_length": 2048} | changes
    return DatasetStatistics(rows=rows, answer_tokens=[20] * rows if answer_tokens is None else answer_tokens, **given)


def test_table_is_complete() -> None:
    assert set(SdftHyperparameters.model_fields) == SDFT_FIELDS == set(TABLE)
    assert set(SupervisedHyperparameters.model_fields) == SUPERVISED_FIELDS
    assert set(FIELDS_NOT_YET_AVAILABLE) == LATER_FIELDS
    assert NOT_YET_AVAILABLE == {"baseline": ("sft_matched",)}


@pytest.mark.parametrize("form", [SdftHyperparameters, SupervisedHyperparameters])
@pytest.mark.parametrize("name", TABLE)
def test_default_range_and_type(form: type[SupervisedHyperparameters], name: str) -> None:
    if name not in form.model_fields:
        with pytest.raises(ValidationError):
            form.model_validate({name: TABLE[name][0][0]})
        return
    accepted, refused, default = TABLE[name]
    assert getattr(form(), name) == default
    for value in accepted:
        assert getattr(form.model_validate({name: value}), name) == value
    for value in refused:
        with pytest.raises(ValidationError) as caught:
            form.model_validate({name: value})
        assert {error["loc"][0] for error in caught.value.errors()} == {name}


def test_a_live_teacher_starts_where_the_student_does() -> None:
    assert SdftHyperparameters.model_validate({"teacher": "live"}).teacher_start == "parent"
    with pytest.raises(ValidationError, match="leave teacher_start out") as caught:
        SdftHyperparameters.model_validate({"teacher": "live", "teacher_start": "base"})
    assert caught.value.errors()[0]["loc"] == ("teacher_start",)


def test_the_sampled_token_alone_has_no_entries_to_clip() -> None:
    given = {"divergence": "reverse", "estimator": "sampled"}
    assert SdftHyperparameters.model_validate(given | {"token_clip": 1.0}).token_clip == 1.0
    with pytest.raises(ValidationError, match="use token_clip") as caught:
        SdftHyperparameters.model_validate(given | {"entry_clip": 1.0})
    assert caught.value.errors()[0]["loc"] == ("entry_clip",)


@pytest.mark.parametrize("name", [*sorted(LATER_FIELDS), "epochs", "lr", "model", ""])
def test_unknown_and_later_fields_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValidationError) as caught:
        SdftHyperparameters.model_validate({name: 1})
    assert caught.value.errors()[0]["loc"] == (name,)


@pytest.mark.parametrize("rate", ["auto", None])
def test_multiplier_needs_the_automatic_rate(rate: str | None) -> None:
    given = {} if rate is None else {"learning_rate": rate}
    assert SdftHyperparameters.model_validate({"learning_rate_multiplier": 2, **given}).learning_rate_multiplier == 2
    assert SdftHyperparameters.model_validate({"learning_rate_multiplier": "auto", "learning_rate": 1e-4}).learning_rate == 1e-4
    with pytest.raises(ValidationError, match="not both") as caught:
        SdftHyperparameters.model_validate({"learning_rate_multiplier": 2, "learning_rate": 1e-4})
    assert caught.value.errors()[0]["loc"] == ("learning_rate_multiplier",)


@pytest.mark.parametrize(("rows", "expected"), [(1, 1), (5, 5), (8, 8), (64, 8), (65, 32), (100_000, 32)])
def test_automatic_batch_size(rows: int, expected: int) -> None:
    assert automatic_batch_size(rows) == expected


@pytest.mark.parametrize(
    ("rows", "batch_size", "epochs"),
    [(1, 1, 50), (10, 8, 50), (16, 8, 50), (17, 8, 48), (24, 8, 34), (33, 8, 25), (64, 8, 13), (65, 32, 50), (3199, 32, 2), (3200, 32, 1), (10**6, 32, 1)],
)
def test_automatic_epochs_fill_a_hundred_batches_within_limits(rows: int, batch_size: int, epochs: int) -> None:
    assert automatic_epochs(rows, batch_size) == epochs
    assert epochs == 50 or rows * epochs >= 100 * batch_size > rows * (epochs - 1)


@pytest.mark.parametrize(("rows", "batch_size", "epochs", "steps"), [(8, 8, 1, 1), (9, 8, 1, 2), (10, 8, 3, 4), (10, 256, 1, 1), (1, 1, 50, 50)])
def test_only_the_last_batch_of_a_run_is_partial(rows: int, batch_size: int, epochs: int, steps: int) -> None:
    assert total_steps_of(rows, batch_size, epochs) == steps


@pytest.mark.parametrize(
    ("hidden_size", "rank", "alpha", "rate"),
    [
        (2048, 16, 32, 5e-4),
        (576, 16, 32, 9.4e-4),
        (64, 16, 32, 1e-3),  # the upper limit
        (8192, 16, 32, 2.5e-4),
        (2048, 16, 64, 2.5e-4),
        (2048, 16, 16, 1e-3),
        (65_536, 16, 64, 1e-4),  # the lower limit
    ],
)
def test_automatic_learning_rate(hidden_size: int, rank: int, alpha: int, rate: float) -> None:
    assert automatic_learning_rate(hidden_size, rank, alpha) == rate


@pytest.mark.parametrize(
    ("answer_tokens", "prompt", "context", "expected"),
    [
        ([20] * 64, 100, 2048, 38),  # 1.5 * 20 + 8
        ([1], 100, 2048, 16),  # never less than 16
        ([10] * 95 + [400] * 5, 100, 2048, 23),  # the longest 5% don't count
        ([10] * 94 + [400] * 6, 100, 2048, 608),
        ([20] * 64, 2020, 2048, 28),  # what the context leaves
        ([20] * 64, 2048, 2048, 1),
        ([20] * 64, 4000, 2048, 1),
    ],
)
def test_automatic_completion_tokens(answer_tokens: list[int], prompt: int, context: int, expected: int) -> None:
    data = statistics(len(answer_tokens), answer_tokens, longest_teacher_prompt=prompt, context_length=context)
    assert automatic_completion_tokens(data) == expected


def test_everything_automatic_is_settled_but_what_needs_the_model() -> None:
    resolved = resolve_sdft(SdftHyperparameters(), statistics(rows=64))
    assert {name for name, value in resolved.model_dump().items() if value == "auto"} == {"temperature", "mask_clipped_completions"}
    assert (resolved.n_epochs, resolved.batch_size, resolved.learning_rate, resolved.lora_alpha) == (13, 8, 5e-4, 32)
    assert (resolved.max_completion_tokens, resolved.checkpoint_every_steps) == (38, 11)  # 104 steps, about ten checkpoints


def test_the_length_of_rollouts_without_answers_and_with_thoughts() -> None:
    assert resolve_sdft(SdftHyperparameters(), statistics(answer_tokens=[0] * 10)).max_completion_tokens == 200  # 1.5 x 128 + 8
    assert resolve_sdft(SdftHyperparameters(), statistics(answer_tokens=[0] * 10 + [20])).max_completion_tokens == 38  # the known one counts
    roomy = statistics(answer_tokens=[20] * 10, context_length=32_768, reasoning=True)
    assert resolve_sdft(SdftHyperparameters(), roomy).max_completion_tokens == 38 + 4096
    tight = statistics(answer_tokens=[20] * 10, longest_teacher_prompt=100, context_length=1000, reasoning=True)
    assert resolve_sdft(SdftHyperparameters(), tight).max_completion_tokens == 900
    assert resolve_sdft(SdftHyperparameters(max_completion_tokens=50), roomy).max_completion_tokens == 50


def test_what_the_user_gave_is_what_the_trainer_gets() -> None:
    given: dict[str, Any] = {
        "n_epochs": 2, "batch_size": 4, "learning_rate": 3e-4, "lora_rank": 8, "lora_alpha": 9, "warmup_ratio": 0.25, "checkpoint_every_steps": 7,
        "anchor_weight": 0.5,
        "max_completion_tokens": 33, "divergence": "reverse", "jsd_beta": 0.2, "estimator": "top_k", "top_k": 9,
            "entry_clip": 0.5, "token_clip": 2.0, "skip_after_think": True, "teacher": "frozen", "ema_rate": 0.1, "teacher_start": "base",
        "temperature": 0.5, "skip_first_tokens": 0, "mask_clipped_completions": False, "weight_decay": 0.01, "max_grad_norm": 0.5, "over_length": "drop",
    }  # fmt: skip
    assert set(given) == SDFT_FIELDS - {"learning_rate_multiplier"}
    assert resolve_sdft(SdftHyperparameters.model_validate(given), statistics()).model_dump() == given
    supervised = {name: given[name] for name in SUPERVISED_FIELDS - {"learning_rate_multiplier"}}
    resolved = resolve_supervised(SupervisedHyperparameters.model_validate(supervised), statistics()).model_dump()
    assert resolved == supervised | {"weight_decay": 0.0, "max_grad_norm": 1.0}


def test_alpha_follows_the_rank_up_to_its_limit_and_the_rate_follows_alpha() -> None:
    assert resolve_supervised(SupervisedHyperparameters(lora_rank=8), statistics()).lora_alpha == 16
    assert resolve_supervised(SupervisedHyperparameters(lora_rank=256), statistics()).lora_alpha == 512
    assert resolve_supervised(SupervisedHyperparameters(lora_rank=16, lora_alpha=64), statistics()).learning_rate == 2.5e-4


def test_multiplier_scales_the_automatic_rate() -> None:
    assert resolve_sdft(SdftHyperparameters(learning_rate_multiplier=0.5), statistics()).learning_rate == pytest.approx(2.5e-4)


@pytest.mark.parametrize(("epochs", "every"), [(1, 1), (2, 2), (50, 40)])
def test_about_ten_checkpoints_a_job(epochs: int, every: int) -> None:
    assert resolve_sdft(SdftHyperparameters(n_epochs=epochs), statistics(rows=64)).checkpoint_every_steps == every
