"""What training cost: the base's abilities that the adapter kept.

General questions are asked greedily of the base and of the student (accuracy by probe), and the base's own answers are scored
under both (KL from base): the first says what is lost, the second how far the model moved where nothing should change.
"""

import torch
from torch import Tensor

from sdft_engine.batching import ScoredText, completion_hidden_states, passes
from sdft_engine.contract.probes import Judged, ProbeQuestion, Retention, is_right, scores_of
from sdft_engine.divergences import forward_kl
from sdft_engine.generation import SamplingParams, Sequence, decode_all
from sdft_engine.lora import STUDENT
from sdft_engine.model import LanguageModel

MAX_ANSWER_TOKENS = 32
CHUNK_POSITIONS = 128


class RetentionProbe:
    """Asks the questions; the base is asked once, when it is first needed."""

    def __init__(self, model: LanguageModel, questions: list[ProbeQuestion]) -> None:
        self.model = model
        self.questions = questions
        self.prompts = [model.chat_format.prompt_ids([{"role": "user", "content": each.question}]) for each in questions]
        self._base_answers: list[list[int]] | None = None

    def measure(self, step: int, adapter: str = STUDENT, max_padded_tokens: int = 4096) -> Retention:
        """Accuracy and divergence of an adapter after `step` steps. One pass holds at most `max_padded_tokens` tokens."""
        if self._base_answers is None:
            self._base_answers = self._greedy_answers(None)
        pairs = zip(self.questions, self._judge(self._base_answers), self._judge(self._greedy_answers(adapter)), strict=True)
        judged = [Judged(question.probe, base, model) for question, base, model in pairs]
        return Retention(step=step, kl_from_base=self._kl_from_base(self._base_answers, adapter, max_padded_tokens), probes=scores_of(judged))

    def _greedy_answers(self, adapter: str | None) -> list[list[int]]:
        params = SamplingParams(MAX_ANSWER_TOKENS, temperature=0, stop_token_ids=self.model.chat_format.eos_token_ids)
        sequences = [Sequence(prompt, params, adapter) for prompt in self.prompts]
        if adapter is None:
            decode_all(self.model, sequences)
        else:
            with self.model.use(adapter):
                decode_all(self.model, sequences)
        return [sequence.token_ids for sequence in sequences]

    def _judge(self, answers: list[list[int]]) -> list[bool]:
        decode = self.model.chat_format.decode
        return [is_right(decode(answer), question.answers) for answer, question in zip(answers, self.questions, strict=True)]

    @torch.no_grad()
    def _kl_from_base(self, answers: list[list[int]], adapter: str, max_padded_tokens: int) -> float:
        """Mean over the answers' tokens of KL(base || adapter), in nats."""
        texts = [ScoredText(prompt, answer) for prompt, answer in zip(self.prompts, answers, strict=True)]
        total = 0.0
        for rows in passes(texts, max_padded_tokens):
            chosen = [texts[row] for row in rows]
            base_NH, own_NH = self._hidden_states(chosen, None), self._hidden_states(chosen, adapter)
            for start in range(0, len(base_NH), CHUNK_POSITIONS):
                part = slice(start, start + CHUNK_POSITIONS)
                base_logps_NV, own_logps_NV = (self.model.logits(hidden[part]).log_softmax(dim=-1) for hidden in (base_NH, own_NH))
                total += float(forward_kl(base_logps_NV, own_logps_NV).sum())
        return total / sum(map(len, answers))

    def _hidden_states(self, texts: list[ScoredText], adapter: str | None) -> Tensor:
        with self.model.adapters.use(adapter):
            return completion_hidden_states(self.model, texts)
