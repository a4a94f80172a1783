"""The table of hyperparameters, row by row: what each takes, what it refuses, and what waits for a later version."""

from typing import Any

import pytest

from api.fine_tuning.jobs.method import resolve_method
from core.errors import BadRequest
from sdft_engine.contract.hyperparameters import FIELDS_NOT_YET_AVAILABLE, NOT_YET_AVAILABLE

TABLE: dict[str, tuple[Any, list[Any], list[Any]]] = {
    # name: (default, some values in range, some values out of range or of the wrong kind)
    "n_epochs": ("auto", ["auto", 1, 50], [0, 51, -1, 1.5, "3", True, "many"]),
    "batch_size": ("auto", ["auto", 1, 256], [0, 257, -8, 1.5, "8", False]),
    "learning_rate": ("auto", ["auto", 1e-7, 1e-4, 1e-2], [0, -1e-4, 1e-8, 0.011, "1e-4", True]),
    "learning_rate_multiplier": ("auto", ["auto", 0.01, 1, 100], [0, -1, 0.009, 101, "2"]),
    "max_completion_tokens": ("auto", ["auto", 1, 32_768], [0, -1, 32_769, 1.5]),
    "lora_rank": (16, [1, 256], [0, 257, "auto", 1.5]),
    "lora_alpha": ("auto", ["auto", 1, 1024], [0, 1025, -1]),
    "divergence": ("forward", ["forward", "reverse", "jsd"], ["sideways", "", 1]),
    "jsd_beta": (0.5, [0.001, 0.999], [0, 1, -0.5, "auto"]),
    "estimator": ("full", ["full", "top_k"], ["half", 1, "sampled"]),
    "top_k": (128, [8, 1024], [7, 1025, 8.5, "auto"]),
    "entry_clip": (None, [0.05, 10], [0, -1, "auto", True]),
    "token_clip": (None, [0.05, 10], [0, -1, "auto", True]),
    "teacher": ("ema", ["ema", "frozen", "live"], ["dead", 1]),
    "ema_rate": (0.02, [0.001, 0.5], [0, 1, -0.1, 2, "auto"]),
    "teacher_start": ("parent", ["parent", "base"], ["child", 1]),
    "temperature": ("auto", ["auto", 0.1, 1, 2], [0, 0.09, 2.1, -1, "hot"]),
    "skip_first_tokens": (3, [0, 32], [-1, 33, 1.5, "auto"]),
    "skip_after_think": (False, [True, False], [1, "yes", "auto"]),
    "mask_clipped_completions": ("auto", ["auto", True, False], ["yes", 1]),
    "anchor_weight": (0.0, [0, 0.5, 10], [-0.1, 10.1, "auto"]),
    "warmup_ratio": (0.1, [0, 0.5, 1], [-0.1, 1.1, "auto"]),
    "weight_decay": (0.0, [0, 1], [-0.1, 1.1]),
    "max_grad_norm": (1.0, [0.001, 100], [0, -1]),
    "checkpoint_every_steps": ("auto", ["auto", 1, 10_000], [0, 10_001, 1.5]),
    "over_length": ("reject", ["reject", "drop"], ["keep", 1]),
}
LATER: dict[str, list[Any]] = {
    "max_retention_drop": [0.1],
    "baseline": ["sft_matched"],
}
SUPERVISED = (
    "n_epochs",
    "batch_size",
    "learning_rate",
    "learning_rate_multiplier",
    "lora_rank",
    "lora_alpha",
    "warmup_ratio",
    "checkpoint_every_steps",
    "anchor_weight",
)


def sdft(**hyperparameters: Any) -> dict[str, Any]:
    method = resolve_method({"type": "sdft", "sdft": {"hyperparameters": hyperparameters}}, None, "sdft")
    resolved: dict[str, Any] = method["sdft"]["hyperparameters"]
    return resolved


def refusal(method: Any, hyperparameters: Any = None) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        resolve_method(method, hyperparameters, "sdft")
    assert caught.value.param is not None
    assert caught.value.param in caught.value.message or "teacher_template" in caught.value.message
    return caught.value


def test_the_table_has_every_row() -> None:
    assert {name: row[0] for name, row in TABLE.items()} == sdft()
    assert {name for name in LATER if name not in NOT_YET_AVAILABLE} == set(FIELDS_NOT_YET_AVAILABLE)
    assert {name: tuple(LATER[name]) for name in NOT_YET_AVAILABLE} == NOT_YET_AVAILABLE


@pytest.mark.parametrize("name", TABLE)
def test_values_in_range_are_kept(name: str) -> None:
    for value in TABLE[name][1]:
        assert sdft(**{name: value}) == {**sdft(), name: value}


@pytest.mark.parametrize("name", TABLE)
def test_values_out_of_range_are_refused_by_name(name: str) -> None:
    for value in [*TABLE[name][2], float("nan"), float("inf"), [], {}]:
        error = refusal({"type": "sdft", "sdft": {"hyperparameters": {name: value}}})
        assert error.param == f"method.sdft.hyperparameters.{name}", value
        assert error.code not in ("not_yet_available", "unknown_parameter"), value


@pytest.mark.parametrize("name", TABLE)
def test_null_is_not_given(name: str) -> None:
    assert sdft(**{name: None}) == sdft()


@pytest.mark.parametrize("name", LATER)
def test_options_that_come_later_are_refused_until_then(name: str) -> None:
    for value in LATER[name]:
        error = refusal({"type": "sdft", "sdft": {name: value}})
        assert (error.code, error.param) == ("not_yet_available", f"method.sdft.{name}")
        inside = refusal({"type": "sdft", "sdft": {"hyperparameters": {name: value}}})
        assert (inside.code, inside.param) == ("unknown_parameter", f"method.sdft.hyperparameters.{name}")


def test_the_sampled_estimator_is_of_the_reverse_divergence() -> None:
    assert sdft(divergence="reverse", estimator="sampled", token_clip=2)["estimator"] == "sampled"
    for divergence in ("forward", "jsd"):
        error = refusal({"type": "sdft", "sdft": {"hyperparameters": {"divergence": divergence, "estimator": "sampled"}}})
        assert error.param == "method.sdft.hyperparameters.estimator"
        assert "reverse" in error.message
    error = refusal({"type": "sdft", "sdft": {"hyperparameters": {"divergence": "reverse", "estimator": "sampled", "entry_clip": 1}}})
    assert error.param == "method.sdft.hyperparameters.entry_clip"
    assert "token_clip" in error.message


def test_unknown_names_are_refused() -> None:
    error = refusal({"type": "sdft", "sdft": {"hyperparameters": {"foo": 1}}})
    assert (error.code, error.param) == ("unknown_parameter", "method.sdft.hyperparameters.foo")
    assert "known are n_epochs" in error.message


@pytest.mark.parametrize("name", ["sampler", "teacher_template", "reasoning", "retention_file", "baseline"])
def test_an_option_among_the_hyperparameters_is_told_its_place(name: str) -> None:
    error = refusal({"type": "sdft", "sdft": {"hyperparameters": {name: "auto"}}})
    assert (error.code, error.param) == ("unknown_parameter", f"method.sdft.hyperparameters.{name}")
    assert error.message.endswith(f"it stands beside hyperparameters, as method.sdft.{name}")
    assert refusal({"type": "sdft", "sdft": {"hyperparamters": {}}}).param == "method.sdft.hyperparamters"
    assert refusal({"type": "sdft", "stfd": {}}).param == "method.stfd"
    assert refusal({"type": "supervised", "supervised": {"teacher_template": "example"}}).param == "method.supervised.teacher_template"
    assert refusal({"type": "sdft", "supervised": {"hyperparameters": {}}}).param == "method.supervised"


@pytest.mark.parametrize("name", TABLE)
def test_supervised_takes_its_own_names_only(name: str) -> None:
    value = TABLE[name][1][-1]
    method = {"type": "supervised", "supervised": {"hyperparameters": {name: value}}}
    if name in SUPERVISED:
        assert resolve_method(method, None, "sdft")["supervised"]["hyperparameters"][name] == value
    else:
        error = refusal(method)
        assert (error.code, error.param) == ("unknown_parameter", f"method.supervised.hyperparameters.{name}")


def test_supervised_in_full() -> None:
    defaults = {name: TABLE[name][0] for name in SUPERVISED}
    assert resolve_method({"type": "supervised"}, None, "sdft") == {"type": "supervised", "supervised": {"hyperparameters": defaults}}


def test_missing_method_follows_the_setting() -> None:
    assert resolve_method(None, None, "sdft")["type"] == "sdft"
    assert resolve_method(None, None, "supervised")["type"] == "supervised"
    method = resolve_method(None, None, "sdft")
    assert method == {
        "type": "sdft",
        "sdft": {"hyperparameters": sdft(), "teacher_template": "example", "reasoning": False, "retention_file": None, "sampler": "auto", "baseline": "none"},
    }


def test_deprecated_hyperparameters_apply_to_the_method() -> None:
    given = {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": None}
    assert resolve_method(None, given, "sdft")["sdft"]["hyperparameters"]["n_epochs"] == 3
    assert resolve_method(None, given, "supervised")["supervised"]["hyperparameters"]["n_epochs"] == 3
    assert resolve_method({"type": "supervised"}, given, "sdft")["supervised"]["hyperparameters"]["n_epochs"] == 3
    assert refusal(None, {"foo": 1}).param == "hyperparameters.foo"
    assert refusal(None, {"n_epochs": 0}).param == "hyperparameters.n_epochs"
    assert refusal({"type": "sdft", "sdft": {"hyperparameters": {"n_epochs": 2}}}, {"n_epochs": 3}).param == "hyperparameters"


@pytest.mark.parametrize("kind", ["dpo", "reinforcement"])
def test_methods_of_others_are_refused_clearly(kind: str) -> None:
    error = refusal({"type": kind, kind: {"hyperparameters": {"beta": 0.1}}})
    assert (error.code, error.param) == ("unsupported_method", "method.type")
    assert kind in error.message


@pytest.mark.parametrize(
    ("method", "param"),
    [
        ({}, None),
        ({"sdft": {}}, "method.type"),
        ({"type": None}, "method.type"),
        ({"type": "magic"}, "method.type"),
        ({"type": 3}, "method.type"),
        ({"type": ["sdft"]}, "method.type"),
        ({"type": "sdft", "sdft": []}, "method.sdft"),
        ({"type": "sdft", "sdft": "x"}, "method.sdft"),
        ({"type": "sdft", "sdft": {"hyperparameters": [1]}}, "method.sdft.hyperparameters"),
        ({"type": "sdft", "sdft": {"hyperparameters": "auto"}}, "method.sdft.hyperparameters"),
    ],
)
def test_wrong_shapes(method: dict[str, Any], param: str | None) -> None:
    if param is None:
        assert resolve_method(method, None, "sdft")["type"] == "sdft"  # nothing given
    else:
        assert refusal(method).param == param


@pytest.mark.parametrize("template", ["example", "history", "history_twice", "Q: {question} A: {demonstration}", "{context}{demonstration}"])
def test_teacher_templates(template: str) -> None:
    assert resolve_method({"type": "sdft", "sdft": {"teacher_template": template}}, None, "sdft")["sdft"]["teacher_template"] == template


@pytest.mark.parametrize("template", ["", "no field", "{demonstration", "{demonstration}{other}", "{demonstration.__class__}", "{demonstration!r}", 3, "\x00"])
def test_wrong_teacher_templates(template: Any) -> None:
    assert refusal({"type": "sdft", "sdft": {"teacher_template": template}}).param == "method.sdft.teacher_template"


def test_template_that_is_too_long() -> None:
    assert "32,768" in refusal({"type": "sdft", "sdft": {"teacher_template": "{demonstration}" + "x" * 40_000}}).message


@pytest.mark.parametrize(("name", "values"), [("sampler", ["auto", "in_process", "vllm"]), ("baseline", ["none"])])
def test_options(name: str, values: list[str]) -> None:
    for value in values:
        assert resolve_method({"type": "sdft", "sdft": {name: value}}, None, "sdft")["sdft"][name] == value
    for wrong in ("other", 1, []):
        error = refusal({"type": "sdft", "sdft": {name: wrong}})
        assert (error.code, error.param) == ("invalid_value", f"method.sdft.{name}")


def test_reasoning_is_a_switch() -> None:
    for value in (True, False):
        assert resolve_method({"type": "sdft", "sdft": {"reasoning": value}}, None, "sdft")["sdft"]["reasoning"] is value
    for wrong in ("yes", 1, []):
        error = refusal({"type": "sdft", "sdft": {"reasoning": wrong}})
        assert (error.code, error.param) == ("bool_type", "method.sdft.reasoning")
