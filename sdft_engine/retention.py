"""What training cost: the base's abilities that the adapter kept.

General questions are asked greedily of the base and of the student (accuracy by probe), and the base's own answers are scored
under both (KL from base): the first says what is lost, the second how far the model moved where nothing should change.
"""

from collections.abc import Callable

from sdft_engine.batching import ScoredText
from sdft_engine.contract.probes import MAX_ANSWER_TOKENS, Judged, ProbeQuestion, Retention, is_right, scores_of
from sdft_engine.evaluation import greedy_answers, mean_token_kl
from sdft_engine.lora import STUDENT
from sdft_engine.model import LanguageModel


class MeasurementStopped(Exception):
    """A stop was asked for in the middle of the questions: nothing was measured."""


class RetentionProbe:
    """Asks the questions; the base is asked once, when it is first needed, unless its answers (token ids) are given."""

    def __init__(self, model: LanguageModel, questions: list[ProbeQuestion], base_answers: list[list[int]] | None = None) -> None:
        self.model = model
        self.questions = questions
        self.prompts = [model.chat_format.prompt_ids([{"role": "user", "content": each.question}]) for each in questions]
        self.base_answers = base_answers

    def measure(self, step: int, adapter: str = STUDENT, max_padded_tokens: int = 4096, stop_wanted: Callable[[], bool] = lambda: False) -> Retention:
        """Accuracy and divergence of an adapter after `step` steps. One pass holds at most `max_padded_tokens` tokens. Raises
        MeasurementStopped where `stop_wanted`, asked before every pass, says so."""

        def before_pass() -> None:
            if stop_wanted():
                raise MeasurementStopped

        if self.base_answers is None:
            self.base_answers = greedy_answers(self.model, self.prompts, None, MAX_ANSWER_TOKENS, before_pass)
        own_answers = greedy_answers(self.model, self.prompts, adapter, MAX_ANSWER_TOKENS, before_pass)
        pairs = zip(self.questions, self._judge(self.base_answers), self._judge(own_answers), strict=True)
        judged = [Judged(question.probe, base, model) for question, base, model in pairs]
        texts = [ScoredText(prompt, answer) for prompt, answer in zip(self.prompts, self.base_answers, strict=True)]
        kl_from_base = mean_token_kl(self.model, texts, None, texts, adapter, max_padded_tokens, before_pass)
        return Retention(step=step, kl_from_base=kl_from_base, probes=scores_of(judged))

    def _judge(self, answers: list[list[int]]) -> list[bool]:
        decode = self.model.chat_format.decode
        return [is_right(decode(answer), question.answers) for answer, question in zip(answers, self.questions, strict=True)]
