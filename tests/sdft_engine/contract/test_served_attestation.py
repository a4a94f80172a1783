"""What proves that a server serves the trained adapter, and what gives away one that does not."""

import hashlib
import json
from pathlib import Path

import pytest

from sdft_engine.contract.run_directory import Attestation, AttestationProbe
from sdft_engine.contract.served_attestation import Verdict, compare_served

TOLERANCE = 0.05


def verdict_on(
    tmp_path: Path, trained: list[float], trained_base: list[float], served: list[float], served_base: list[float], served_dtype: str | None = None
) -> Verdict:
    probe = AttestationProbe(token_ids=list(range(len(trained) + 1)), adapter_logps=trained, base_logps=trained_base)
    (tmp_path / "attestation.json").write_text(Attestation(dtype="float32", probes=[probe]).model_dump_json())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    return compare_served(tmp_path, lambda ids: served, lambda ids: served_base, served_dtype, TOLERANCE)


def test_the_same_adapter_on_the_same_base_is_proved(tmp_path: Path) -> None:
    verdict = verdict_on(tmp_path, [-1.0, -2.0], [-1.0, -3.0], [-1.01, -2.02], [-1.0, -3.03])
    assert verdict.reason is None
    assert verdict.record["matched"] is True
    assert verdict.record["largest_difference"] == pytest.approx(0.02)
    assert verdict.record["largest_base_difference"] == pytest.approx(0.03)
    assert (verdict.record["probe_count"], verdict.record["token_count"], verdict.record["clear_places"]) == (1, 2, 1)
    assert verdict.record["tolerance"] == TOLERANCE
    assert verdict.record["weights_sha256"] == hashlib.sha256(b"weights").hexdigest()


def test_a_server_that_ignores_the_adapter_is_found_out(tmp_path: Path) -> None:
    verdict = verdict_on(tmp_path, [-1.0, -2.0], [-1.0, -3.0], [-1.0, -3.0], [-1.0, -3.0])
    assert verdict.reason == "the inference server answers as if the adapter were not applied"
    assert verdict.record["matched"] is False


def test_it_is_found_out_even_where_the_difference_is_within_twice_the_tolerance(tmp_path: Path) -> None:
    """The served base lies between trained adapter and trained base, near enough to both: only its sameness betrays it."""
    verdict = verdict_on(tmp_path, [-1.00, -2.00], [-1.06, -2.06], [-1.03, -2.03], [-1.03, -2.03])
    assert verdict.reason == "the inference server answers as if the adapter were not applied"


def test_an_adapter_without_clear_effect_needs_no_difference(tmp_path: Path) -> None:
    assert verdict_on(tmp_path, [-1.0], [-1.001], [-1.0], [-1.0]).reason is None


def test_a_different_adapter_is_refused(tmp_path: Path) -> None:
    reason = verdict_on(tmp_path, [-1.0, -2.0], [-1.0, -3.0], [-1.0, -2.2], [-1.0, -3.0]).reason
    assert reason == "the served adapter differs from the trained one by 0.2 nats, more than 0.05"


def test_a_different_base_is_refused(tmp_path: Path) -> None:
    reason = verdict_on(tmp_path, [-1.0, -2.0], [-1.0, -3.0], [-1.0, -2.0], [-1.0, -3.1]).reason
    assert reason is not None
    assert reason.startswith("the inference server's base model differs")


@pytest.mark.parametrize(("served", "served_base"), [([-1.0, -2.2], [-1.0, -3.0]), ([-1.0, -2.0], [-1.0, -3.1])])
def test_precisions_that_differ_are_named_with_the_remedy(tmp_path: Path, served: list[float], served_base: list[float]) -> None:
    verdict = verdict_on(tmp_path, [-1.0, -2.0], [-1.0, -3.0], served, served_base, served_dtype="bfloat16")
    assert verdict.reason is not None
    assert verdict.reason.endswith("the trainer computed in float32 and the inference server in bfloat16: set SDFT_DTYPE to one of them for both")
    assert verdict.record["reason"] == verdict.reason
    assert (verdict.record["dtype"], verdict.record["served_dtype"]) == ("float32", "bfloat16")


@pytest.mark.parametrize("served_dtype", [None, "float32"])
def test_precisions_that_agree_or_are_unknown_are_not_blamed(tmp_path: Path, served_dtype: str | None) -> None:
    reason = verdict_on(tmp_path, [-1.0, -2.0], [-1.0, -3.0], [-1.0, -2.2], [-1.0, -3.0], served_dtype).reason
    assert reason is not None
    assert "SDFT_DTYPE" not in reason


def test_precisions_that_differ_are_no_reason_by_themselves(tmp_path: Path) -> None:
    assert verdict_on(tmp_path, [-1.0, -2.0], [-1.0, -3.0], [-1.01, -2.02], [-1.0, -3.0], "bfloat16").reason is None


@pytest.mark.parametrize("served", [[-1.0], [-1.0, float("nan")]])
def test_answers_that_are_no_log_probabilities_prove_nothing(tmp_path: Path, served: list[float]) -> None:
    verdict = verdict_on(tmp_path, [-1.0, -2.0], [-1.0, -2.0], served, [-1.0, -2.0])
    assert verdict.reason is not None
    assert json.loads(json.dumps(verdict.record, allow_nan=False))["largest_difference"] is None


def test_without_probes_nothing_is_proved(tmp_path: Path) -> None:
    (tmp_path / "attestation.json").write_text(Attestation(dtype="float32", probes=[]).model_dump_json())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    assert compare_served(tmp_path, lambda ids: [], lambda ids: [], None, TOLERANCE).reason is not None
