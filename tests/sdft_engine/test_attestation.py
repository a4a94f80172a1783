"""sdft_engine.attestation: log-probabilities that a serving plane can check an adapter by."""

import pytest

from sdft_engine.attestation import PROBE_TOKENS, PROBES, Attestor
from sdft_engine.contract.dataset import Demonstration
from sdft_engine.lora import STUDENT
from sdft_engine.model import LanguageModel
from tests.sdft_engine.plain import PlainModel, add_adapter, in_float64, randomise


def demonstration(number: int, words: int = 1) -> Demonstration:
    return Demonstration(number, [{"role": "user", "content": f"lamp {number} " * words}], {"role": "assistant", "content": f"It is red {number}."})


def test_probes_are_the_ends_of_the_first_demonstrations(model: LanguageModel) -> None:
    demonstrations = [demonstration(number, words) for number, words in enumerate([1, 40, 1, 1, 1, 1])]
    attestor = Attestor(model, demonstrations)
    assert len(attestor.probes) == PROBES
    for probe, each in zip(attestor.probes, demonstrations, strict=False):
        whole = model.chat_format.student_prompt_ids(each) + model.chat_format.answer_ids(each)
        assert probe == whole[-PROBE_TOKENS:]
    assert len(attestor.probes[1]) == PROBE_TOKENS
    assert len(attestor.probes[0]) < PROBE_TOKENS
    assert len(Attestor(model, demonstrations[:2]).probes) == 2


def test_both_log_probabilities_equal_a_plain_forward(model: LanguageModel, plain: PlainModel) -> None:
    factors = add_adapter(model, STUDENT, seed=1, trainable=True)
    attestation = Attestor(model, [demonstration(1), demonstration(2, 40)]).attest()
    assert attestation.dtype == "float32"
    assert len(attestation.probes) == 2
    for probe in attestation.probes:
        ids = probe.token_ids
        for own, changed in ((probe.adapter_logps, in_float64(factors)), (probe.base_logps, None)):
            logps = plain.completion_logps(ids[:1], ids[1:], changed, 2.0)
            assert own == pytest.approx([float(logps[i, token]) for i, token in enumerate(ids[1:])], abs=2e-4)
        assert max(abs(a - b) for a, b in zip(probe.adapter_logps, probe.base_logps, strict=True)) > 0.1


def test_each_attestation_is_of_the_adapter_as_it_is_then(model: LanguageModel) -> None:
    add_adapter(model, STUDENT, seed=1, trainable=True)
    attestor = Attestor(model, [demonstration(1)])
    (first,) = attestor.attest().probes
    randomise(model.adapters, STUDENT, seed=2)
    (second,) = attestor.attest().probes
    assert first.adapter_logps != second.adapter_logps
    assert first.base_logps == second.base_logps
    randomise(model.adapters, STUDENT, seed=2, strength=0.0)
    (third,) = attestor.attest().probes
    assert third.adapter_logps == pytest.approx(third.base_logps, abs=1e-5)


def test_bfloat16_is_named(bfloat16_model: LanguageModel) -> None:
    add_adapter(bfloat16_model, STUDENT, seed=1, trainable=True)
    assert Attestor(bfloat16_model, [demonstration(1)]).attest().dtype == "bfloat16"
