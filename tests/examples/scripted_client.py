"""What the demo uses of the stock client, played from a script: no server, no model."""

from collections.abc import Callable
from dataclasses import dataclass, field
from io import StringIO
from types import SimpleNamespace as Object
from typing import Any

import httpx2
from openai import BadRequestError
from rich.console import Console
from rich.progress import Progress


@dataclass(frozen=True)
class Moment:
    """What one look at the job finds. `checkpoints` are pairs of step and token accuracy."""

    status: str
    checkpoints: tuple[tuple[int, float | None], ...] = ()


@dataclass
class ScriptedClient:
    """The job moves on by one moment with every retrieval and stays at the last. A checkpoint's model is `step-<step>`."""

    moments: list[Moment]
    answer: Callable[[str, str], str] = lambda model, question: ""
    """From model and last message."""
    ends_before_cancel: bool = False
    """A cancellation comes too late: it is refused, and the job goes on to its next moment."""
    unverified_looks: int = 0
    """How often a model is looked up before it is servable."""
    cancellations: int = 0
    asked: list[tuple[str, list[dict[str, str]]]] = field(default_factory=list)
    created: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._position = -1
        self.fine_tuning = Object(
            jobs=Object(
                create=self._create,
                retrieve=self._retrieve,
                cancel=self._cancel,
                list_events=lambda job_id, limit: Object(data=[]),
                checkpoints=Object(list=self._checkpoints),
            )
        )
        self.models = Object(retrieve=self._model)
        self.chat = Object(completions=Object(create=self._complete))

    @property
    def scored_models(self) -> list[str]:
        """In the order in which they were first asked."""
        return list(dict.fromkeys(model for model, _ in self.asked))

    def _create(self, **request: Any) -> Object:
        self.created = request
        return Object(id="ftjob-1")

    def _retrieve(self, job_id: str) -> Object:
        self._position = min(self._position + 1, len(self.moments) - 1)
        status = "cancelled" if self.cancellations else self.moments[self._position].status
        return Object(id=job_id, status=status, error=None, fine_tuned_model="tuned", model_extra={"progress": {"step": 1, "total_steps": 9}})

    def _cancel(self, job_id: str) -> None:
        if self.ends_before_cancel:
            response = httpx2.Response(400, request=httpx2.Request("POST", "http://localhost/cancel"))
            raise BadRequestError("the job has already succeeded", response=response, body={"code": "job_already_finished"})
        self.cancellations += 1

    def _checkpoints(self, job_id: str, limit: int) -> Object:
        newest_first = reversed(self.moments[self._position].checkpoints)
        return Object(
            data=[
                Object(step_number=step, fine_tuned_model_checkpoint=f"step-{step}", metrics=Object(train_mean_token_accuracy=accuracy))
                for step, accuracy in newest_first
            ]
        )

    def _model(self, model: str) -> Object:
        self.unverified_looks -= 1
        return Object(model_extra={"status": "verifying" if self.unverified_looks >= 0 else "servable"})

    def _complete(self, *, model: str, messages: list[dict[str, str]], temperature: float, max_tokens: int) -> Object:
        self.asked.append((model, messages))
        return Object(choices=[Object(message=Object(content=self.answer(model, messages[-1]["content"])))])


def silent_progress() -> Progress:
    return Progress(console=Console(file=StringIO()))
