"""What every arm of learning.py shares: the data, the questions, how a session is opened and how a model is scored."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from core.settings import Settings
from sdft_engine.contract.config import TrainingConfig
from sdft_engine.contract.dataset import Demonstration, read_dataset
from sdft_engine.contract.hyperparameters import ResolvedSdft, ResolvedSupervised
from sdft_engine.contract.probes import ProbeQuestion, is_right, read_probes
from sdft_engine.contract.run_directory import RunDirectory
from sdft_engine.contract.teacher_prompts import TeacherView
from sdft_engine.evaluation import greedy_answers
from sdft_engine.lora import STUDENT
from sdft_engine.model import LanguageModel, load_base_model
from sdft_engine.prepare_base_model import prepare_base_model
from sdft_engine.retention import RetentionProbe
from sdft_engine.session import Session, open_session, settle
from sdft_engine.trainer import training_step

DATA_DIR = Path(__file__).parents[2] / "examples" / "support_facts"
BASE_MODEL = "smollm2-135m-instruct"
MAX_ANSWER_TOKENS = 32
TEMPERATURE = 0.5

SHARED = {
    "batch_size": 8,
    "learning_rate": 1e-3,
    "lora_rank": 16,
    "lora_alpha": 32,
    "warmup_ratio": 0.1,
    "checkpoint_every_steps": 10**6,
}
SDFT = SHARED | {
    "n_epochs": 40,
    "learning_rate": 5e-4,
    "max_completion_tokens": 20,
    "divergence": "forward",
    "estimator": "full",
    "teacher": "ema",
    "ema_rate": 0.05,
    "teacher_start": "parent",
    "temperature": TEMPERATURE,
    "skip_first_tokens": 3,
    "mask_clipped_completions": False,
    "over_length": "reject",
}
SUPERVISED = SHARED | {"n_epochs": 20}
VIEW = TeacherView("history_twice")


@dataclass(frozen=True)
class Count:
    right: int
    n: int


@dataclass
class Scores:
    """Of one model: trained questions, paraphrases of them, general questions. `retained` counts those that the base answers
    too, `kl_from_base` is the mean over the tokens of the base's own answers to the general questions, in nats."""

    trained: Count
    paraphrases: Count
    general: Count | None = None
    retained: Count | None = None
    kl_from_base: float | None = None
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    text: str
    answers: list[str]
    demonstration: int
    """Place of the line that teaches it."""


class Bench:
    """`limit` questions of each kind are asked, of the general ones every n-th so that all probes are among them."""

    def __init__(self, limit: int | None = None) -> None:
        settings = Settings()
        entry = next(each for each in settings.base_models if each.id == BASE_MODEL)
        self.model_dir = prepare_base_model(entry.id, entry.source, entry.revision, entry.directory(settings.cache_dir))
        with (DATA_DIR / "demonstrations.jsonl").open("rb") as lines:
            self.demonstrations: list[Demonstration] = read_dataset(lines)[0]
        self.trained = read_questions("trained.jsonl")[:limit]
        self.paraphrases = read_questions("paraphrases.jsonl")[:limit]
        general = read_probes(DATA_DIR / "retention.jsonl")
        self.base_answers: list[list[int]] | None = None
        """To the general questions: every row is compared with the same ones."""
        self.general: list[ProbeQuestion] = general if limit is None else general[:: max(1, len(general) // limit)]

    @contextmanager
    def session(self, method: str, hyperparameters: dict[str, Any], seed: int, parent: Path | None = None, **config: Any) -> Iterator[Session]:
        """A run that is about to take its first step, on a model of its own. `config`: more of its TrainingConfig."""
        with TemporaryDirectory(prefix="sdft-learning-") as directory:
            run = RunDirectory(Path(directory))
            sections = {"sdft": ResolvedSdft, "supervised": ResolvedSupervised}
            whole = TrainingConfig(
                method=method,  # type: ignore[arg-type]
                base_model=BASE_MODEL,
                base_model_dir=self.model_dir,
                seed=seed,
                dtype="float32",
                teacher_template=VIEW.template,
                **{method: sections[method].model_validate(hyperparameters)},  # type: ignore[arg-type]
                **config,
            )
            run.config_path.write_text(whole.model_dump_json())
            run.train_path.write_bytes((DATA_DIR / "demonstrations.jsonl").read_bytes())
            if parent is not None:
                run.parent_adapter_dir.symlink_to(parent)
            session = open_session(run)
            settle(session, lambda: None)
            yield session

    def base(self) -> LanguageModel:
        return load_base_model(self.model_dir, dtype="float32")

    def right(self, model: LanguageModel, adapter: str | None, questions: list[Question], shown: Callable[[Question], list[dict[str, Any]]]) -> Count:
        """Greedy answers that hold an accepted string on word boundaries."""
        prompts = [model.chat_format.prompt_ids(shown(question)) for question in questions]
        answers = greedy_answers(model, prompts, adapter, MAX_ANSWER_TOKENS)
        judged = [is_right(model.chat_format.decode(answer), q.answers) for answer, q in zip(answers, questions, strict=True)]
        return Count(sum(judged), len(judged))

    def learned(self, model: LanguageModel, adapter: str | None = STUDENT) -> Scores:
        return Scores(self.right(model, adapter, self.trained, alone), self.right(model, adapter, self.paraphrases, alone))

    def scores(self, model: LanguageModel, adapter: str | None = STUDENT) -> Scores:
        scores = self.learned(model, adapter)
        probe = RetentionProbe(model, self.general, self.base_answers)
        retention = probe.measure(0, adapter)
        self.base_answers = probe.base_answers
        scores.general = Count(retention.right, retention.n)
        scores.retained = Count(retention.kept, retention.base_right)
        scores.kl_from_base = retention.kl_from_base
        return scores

    def demonstration_of(self, question: Question) -> Demonstration:
        return self.demonstrations[question.demonstration]


def alone(question: Question) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question.text}]


def read_questions(name: str) -> list[Question]:
    rows = [json.loads(line) for line in (DATA_DIR / name).read_text().splitlines()]
    return [Question(row["question"], row["answers"], row["demonstration"] - 1) for row in rows]


def take_steps(session: Session, steps: int | None = None) -> float:
    """Train to the end, or `steps` further. Returns the seconds that it took."""
    start = time.perf_counter()
    last = session.total_steps if steps is None else min(session.total_steps, session.state.step + steps)
    while session.state.step < last:
        training_step(session, session.state.step + 1)
    return time.perf_counter() - start
