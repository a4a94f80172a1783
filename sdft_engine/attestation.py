"""Proof for the serving plane: log-probabilities of fixed token sequences, with the adapter and without."""

from sdft_engine.contract.dataset import Demonstration
from sdft_engine.contract.run_directory import Attestation, AttestationProbe
from sdft_engine.generation import score
from sdft_engine.lora import STUDENT
from sdft_engine.model import LanguageModel, dtype_name

PROBES = 4
PROBE_TOKENS = 96


class Attestor:
    """Scores the first demonstrations (the end of the prompt with its answer) under the bare base once, and under the
    adapter at every checkpoint."""

    def __init__(self, model: LanguageModel, demonstrations: list[Demonstration], base: str | None = None) -> None:
        """`base`: what the base model was made from."""
        self.model, self.base = model, base
        chat_format = model.chat_format
        texts = [chat_format.student_prompt_ids(d) + chat_format.answer_ids(d) for d in demonstrations[:PROBES]]
        self.probes = [ids[-PROBE_TOKENS:] for ids in texts]
        self.base_logps = [score(model, ids, None)[0] for ids in self.probes]

    def attest(self) -> Attestation:
        probes = [
            AttestationProbe(token_ids=ids, adapter_logps=score(self.model, ids, STUDENT)[0], base_logps=base)
            for ids, base in zip(self.probes, self.base_logps, strict=True)
        ]
        return Attestation(dtype=dtype_name(self.model.dtype), probes=probes, base=self.base)
