"""Ends a run whose student degenerates, before it costs hours: moving teachers can follow a student into nonsense.

The mean of the last WINDOW steps is compared with that of the first WINDOW steps. Entropy and divergence may fall as far as they
like: that is learning. What ends a run is one of these, where the first steps were not like that:

    entropy      three times the early one and two nats more: the student's next token is anybody's guess
    divergence   four times the early one and one nat more: student and teacher fly apart
    length       a quarter of the early one, and two tokens at most: there are no answers any more
    no ends      19 of 20 answers are cut off, half of them at most in the beginning
"""

from dataclasses import dataclass, field

from sdft_engine.contract.errors import Collapsed
from sdft_engine.contract.metrics import StepMetrics

WINDOW = 10
WATCHED = ("student_entropy", "train_loss", "completion_tokens_mean", "clipped_ratio")

REMEDIES = {
    "live": "use the teacher frozen or ema instead of live, or a lower learning_rate",
    "ema": "use the frozen teacher or a smaller ema_rate, or a lower learning_rate",
    "frozen": "use a lower learning_rate or temperature, or a teacher_template that this model follows more closely",
}


@dataclass
class CollapseGuard:
    """The first and the last steps' measurements; both belong to a checkpoint, so that a resumed run judges alike."""

    early: list[dict[str, float]] = field(default_factory=list)
    recent: list[dict[str, float]] = field(default_factory=list)

    def observe(self, metrics: StepMetrics, teacher: str, checkpoint_steps: list[int]) -> None:
        """Raise Collapsed where the student degenerates; it names the last checkpoint from before the window that shows it.

        A step without a loss token says nothing and is left out.
        """
        measured = {name: getattr(metrics, name) for name in WATCHED}
        if any(value is None for value in measured.values()):
            return
        if len(self.early) < WINDOW:
            self.early.append(measured)
            return
        self.recent = [*self.recent, measured][-WINDOW:]
        if len(self.recent) < WINDOW:
            return
        reason = self._reason()
        if reason is None:
            return
        kept = [step for step in checkpoint_steps if step <= metrics.step - WINDOW]
        keeps = f"the checkpoint of step {kept[-1]} is from before that" if kept else "no checkpoint is from before that"
        raise Collapsed(
            f"the student has degenerated at step {metrics.step}: {reason}; {keeps}. To avoid it, {REMEDIES[teacher]}",
            param="method.sdft.hyperparameters.teacher",
        )

    def _reason(self) -> str | None:
        early = {name: sum(step[name] for step in self.early) / WINDOW for name in WATCHED}
        now = {name: sum(step[name] for step in self.recent) / WINDOW for name in WATCHED}
        entropy, divergence, length, clipped = WATCHED
        if now[entropy] > max(3 * early[entropy], early[entropy] + 2):
            return f"its entropy rose from {early[entropy]:.2f} to {now[entropy]:.2f} nats a token"
        if now[divergence] > max(4 * early[divergence], early[divergence] + 1):
            return f"its divergence from the teacher rose from {early[divergence]:.2f} to {now[divergence]:.2f} nats a token"
        if now[length] < min(early[length] / 4, 2):
            return f"its answers shrank from {early[length]:.1f} to {now[length]:.1f} tokens"
        if now[clipped] >= 0.95 and early[clipped] <= 0.5:
            return f"{now[clipped]:.0%} of its answers no longer end, in the beginning {early[clipped]:.0%} did not"
        return None
