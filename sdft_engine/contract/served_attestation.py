"""Proof that an inference server serves what was trained, not the bare base model.

The trainer left log-probabilities of fixed token sequences, with the adapter and without. The server must reproduce both
within the tolerance, and wherever the trainer's adapter clearly differs from its base, the served one must differ from
the served base as well. The second condition is no consequence of the first: an adapter that changes little would match
within the tolerance even if it were never applied.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdft_engine.contract.run_directory import Attestation, AttestationProbe
from sdft_engine.contract.sealed_directory import ADAPTER_WEIGHTS_NAME, ATTESTATION_NAME, file_sha256

LEAST_SHARE = 0.5
"""Of the trainer's difference between adapter and base, summed over the places where it is clear, the served one must show
this share. Rounding moves single places, not the sum; an adapter that is not applied shows none of it."""

Score = Callable[[list[int]], list[float]]
"""Natural log-probabilities of all token ids but the first, each given what stands before it."""


@dataclass(frozen=True)
class Verdict:
    """`reason` is None where the server proved itself. `record` is what was measured, as JSON."""

    reason: str | None
    record: dict[str, Any]


@dataclass
class _Differences:
    adapter: float = 0.0
    base: float = 0.0
    trained_effect: float = 0.0
    served_effect: float = 0.0
    clear_places: int = 0


def compare_served(adapter_dir: Path, score_adapter: Score, score_base: Score, served_dtype: str | None, tolerance: float) -> Verdict:
    """Compare what a server answers with the attestation in `adapter_dir`. `tolerance` in nats; `served_dtype`, where the server
    tells it, explains a difference. Raises what the scores raise."""
    path = adapter_dir / ATTESTATION_NAME
    attestation = Attestation.model_validate_json(path.read_bytes()) if path.exists() else Attestation(dtype="", probes=[])
    found = _Differences()
    for probe in attestation.probes:
        _compare(probe, score_adapter(probe.token_ids), score_base(probe.token_ids), tolerance, found)
    reason = _reason(attestation, found, tolerance)
    if reason and served_dtype not in (None, attestation.dtype):
        reason += f"; the trainer computed in {attestation.dtype} and the inference server in {served_dtype}: set SDFT_DTYPE to one of them for both"
    record = {
        "matched": reason is None,
        "reason": reason,
        "probe_count": len(attestation.probes),
        "token_count": sum(len(probe.token_ids) - 1 for probe in attestation.probes),
        "largest_difference": _finite(found.adapter),
        "largest_base_difference": _finite(found.base),
        "clear_places": found.clear_places,
        "tolerance": tolerance,
        "dtype": attestation.dtype,
        "served_dtype": served_dtype,
        "weights_sha256": file_sha256(adapter_dir / ADAPTER_WEIGHTS_NAME),
    }
    return Verdict(reason, record)


def _compare(probe: AttestationProbe, served: list[float], served_base: list[float], tolerance: float, found: _Differences) -> None:
    if not len(served) == len(served_base) == len(probe.adapter_logps) == len(probe.base_logps):
        found.adapter = math.inf
        return
    for trained, trained_base, here, here_base in zip(probe.adapter_logps, probe.base_logps, served, served_base, strict=True):
        found.adapter = _larger(found.adapter, abs(here - trained))
        found.base = _larger(found.base, abs(here_base - trained_base))
        if abs(trained - trained_base) > tolerance:
            found.clear_places += 1
            found.trained_effect += abs(trained - trained_base)
            found.served_effect += abs(here - here_base)


def _reason(attestation: Attestation, found: _Differences, tolerance: float) -> str | None:
    if not attestation.probes:
        return "the trainer left nothing to compare with"
    if found.clear_places and not found.served_effect >= LEAST_SHARE * found.trained_effect:
        return "the inference server answers as if the adapter were not applied"
    if not found.base <= tolerance:
        return f"the inference server's base model differs from the trainer's by {found.base:.3g} nats, more than {tolerance:g}"
    if not found.adapter <= tolerance:
        return f"the served adapter differs from the trained one by {found.adapter:.3g} nats, more than {tolerance:g}"
    return None


def _larger(known: float, value: float) -> float:
    """The maximum, in which a NaN is never forgotten."""
    return math.inf if math.isnan(value) else max(known, value)


def _finite(value: float) -> float | None:
    """Infinity is no JSON."""
    return value if math.isfinite(value) else None
