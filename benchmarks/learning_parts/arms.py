"""The arms of learning.py: each trains (or only prompts) the same base model on the same facts in its own way."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.learning_parts.bench import MAX_ANSWER_TOKENS, SDFT, SUPERVISED, TEMPERATURE, VIEW, Bench, Count, Question, Scores, alone, take_steps
from sdft_engine.anchor import PROMPTS_PATH, read_prompts
from sdft_engine.batching import ScoredText
from sdft_engine.contract.probes import is_right
from sdft_engine.contract.teacher_prompts import answer_text, teacher_messages
from sdft_engine.evaluation import check_in_context
from sdft_engine.generation import decode_all
from sdft_engine.lora import STUDENT
from sdft_engine.sampling import Decoding, SamplingParams
from sdft_engine.seeds import seed_of

Results = dict[str, Scores]
"""By the name of a row of the table."""
RATES = (1e-4, 3e-4, 1e-3)
MATCH_EVERY_STEPS = 4
LIMITS: dict[str, Any] = {}
"""What a short run changes, whatever an arm says."""
RESTORATION = {"n_epochs": 15, "learning_rate": 3e-4, "teacher": "frozen", "teacher_start": "base", "temperature": 1.0, "max_completion_tokens": 32}
ANCHOR = {"anchor_weight": 1.0}


@dataclass(frozen=True)
class Arm:
    """`run(bench, seed, so_far)` trains once and returns one row or several; `so_far` holds this seed's earlier rows. `seeded`:
    False where nothing in it is random."""

    name: str
    run: Callable[[Bench, int, Results], Results]
    seeded: bool = True


def base(bench: Bench, seed: int, so_far: Results) -> Results:
    return {"base": bench.scores(bench.base(), None)}


def teacher(bench: Bench, seed: int, so_far: Results) -> Results:
    """The base that is shown the demonstration, and how far that takes it from the base without one."""
    model = bench.base()

    def shown(question: Question) -> list[dict[str, Any]]:
        return teacher_messages(replace(bench.demonstration_of(question), prompt=alone(question)), VIEW)

    prompts = [model.chat_format.prompt_ids(alone(question)) for question in bench.trained]
    shown_prompts = [model.chat_format.prompt_ids(shown(question)) for question in bench.trained]

    def right(row: int, answer: str) -> bool:
        return is_right(answer, bench.trained[row].answers)

    check = check_in_context(model, prompts, shown_prompts, right, max_new_tokens=MAX_ANSWER_TOKENS, temperature=TEMPERATURE)
    trained = Count(check.lift.teacher_right, check.lift.n)
    return {"teacher": Scores(trained, bench.right(model, None, bench.paraphrases, shown), extra={"kl_of_own_samples": check.teacher_kl})}


def oracle_retrieval(bench: Bench, seed: int, so_far: Results) -> Results:
    """The base with the right document in its prompt, as a perfect retriever would put it there."""
    model = bench.base()

    def shown(question: Question) -> list[dict[str, Any]]:
        content = f"Use the following information:\n\n{document_of(bench, question.demonstration)}\n\n{question.text}"
        return [{"role": "user", "content": content}]

    return {"oracle retrieval": Scores(bench.right(model, None, bench.trained, shown), bench.right(model, None, bench.paraphrases, shown))}


def sdft(name: str, **changed: Any) -> Arm:
    def run(bench: Bench, seed: int, so_far: Results) -> Results:
        with bench.session("sdft", SDFT | changed | LIMITS, seed) as session:
            seconds = take_steps(session)
            return {name: _with(bench.scores(session.model), seconds)}

    return Arm(name, run)


def sft(name: str, **changed: Any) -> Arm:
    """To its end, and stopped at the first of its checkpoints that knows as many trained questions as SDFT."""

    def run(bench: Bench, seed: int, so_far: Results) -> Results:
        target = so_far["SDFT"].trained.right if "SDFT" in so_far else None
        rows: Results = {}
        seconds = 0.0
        with bench.session("supervised", SUPERVISED | changed, seed) as session:
            while session.state.step < session.total_steps:
                seconds += take_steps(session, MATCH_EVERY_STEPS)
                matched = f"{name}, matched"
                if target and matched not in rows and bench.learned(session.model).trained.right >= target:
                    rows[matched] = _with(bench.scores(session.model), seconds, step=session.state.step)
            return rows | {name: _with(bench.scores(session.model), seconds)}

    return Arm(name, run)


def offline_distillation(bench: Bench, seed: int, so_far: Results) -> Results:
    """SFT on answers that the teacher wrote: as many of every question as there are epochs, sampled as SDFT samples."""
    with bench.session("supervised", SUPERVISED, seed) as session:
        epochs = session.config.hyperparameters.n_epochs
        chat_format = session.model.chat_format
        prompts = [chat_format.teacher_prompt_ids(demonstration, VIEW) for demonstration in bench.demonstrations] * epochs
        params = [
            SamplingParams(MAX_ANSWER_TOKENS, TEMPERATURE, seed=seed_of(seed, "offline", place), stop_token_ids=chat_format.eos_token_ids)
            for place in range(len(prompts))
        ]
        written = [Decoding(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
        decode_all(session.model, written)
        rows = len(bench.demonstrations)
        own = list(session.texts)

        seconds = 0.0
        for epoch in range(epochs):
            session.texts = [ScoredText(text.prompt_ids, written[epoch * rows + row].token_ids) for row, text in enumerate(own)]
            seconds += take_steps(session, rows // session.config.hyperparameters.batch_size)
        return {"offline distillation": _with(bench.scores(session.model), seconds)}


def continued_pretraining(bench: Bench, seed: int, so_far: Results) -> Results:
    """CPT: the facts as plain text, every token of it, without questions or a chat."""
    with bench.session("supervised", SUPERVISED, seed) as session:
        tokenizer = session.model.chat_format
        start = sorted(tokenizer.eos_token_ids)[:1]
        session.texts = [ScoredText(start, tokenizer.encode(document_of(bench, row)) + start) for row in range(len(bench.demonstrations))]
        seconds = take_steps(session)
        return {"CPT": _with(bench.scores(session.model), seconds)}


def restoration(bench: Bench, seed: int, so_far: Results) -> Results:
    """SFT, then the base as teacher of the student's own answers to general prompts (none of them asked here)."""
    with TemporaryDirectory(prefix="sdft-restoration-") as directory:
        with bench.session("supervised", SUPERVISED, seed) as session:
            seconds = take_steps(session)
            session.model.adapters.save(STUDENT, Path(directory), session.config.base_model)
        with bench.session("sdft", SDFT | RESTORATION, seed, parent=Path(directory)) as session:
            general = read_prompts(PROMPTS_PATH)[: len(session.texts)]
            prompts = [session.model.chat_format.prompt_ids([{"role": "user", "content": prompt}]) for prompt in general]
            session.texts = [ScoredText(prompt, []) for prompt in prompts]
            session.teacher_prompts = prompts
            session.prompt_cache = None
            seconds += take_steps(session)
            return {"SFT, then restoration": _with(bench.scores(session.model), seconds)}


def document_of(bench: Bench, row: int) -> str:
    answer = bench.demonstrations[row].answer
    assert answer is not None
    return answer_text(answer)


def _with(scores: Scores, seconds: float, **extra: float) -> Scores:
    scores.extra |= {"seconds": seconds} | extra
    return scores


ARMS = (
    Arm("base", base, seeded=False),
    Arm("teacher", teacher, seeded=False),
    Arm("oracle retrieval", oracle_retrieval, seeded=False),
    sdft("SDFT"),
    sdft("SDFT, lr 0.001, slower average", learning_rate=1e-3, ema_rate=0.02, n_epochs=33),
    sdft("SDFT, frozen teacher", teacher="frozen"),
    sdft("SDFT, reverse", divergence="reverse"),
    sdft("SDFT, anchored", **ANCHOR),
    *(sft(f"SFT, lr {rate:g}", learning_rate=rate) for rate in RATES),
    sft("SFT, anchored", **ANCHOR),
    Arm("offline distillation", offline_distillation),
    Arm("CPT", continued_pretraining),
    Arm("SFT, then restoration", restoration),
)
