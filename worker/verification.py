"""Models become servable here: loaded into the inference servers and compared with what the trainer measured.

The final model of a job is verified while the job is published; checkpoints, and models whose server could not be reached
then, by a thread that looks for them every few seconds. A model that failed the comparison is tried again too, but rarely: its
bytes never change, and yet the server may have been the one that was wrong, in another precision say.
"""

import time
from dataclasses import dataclass, field

from sqlalchemy import select, true, update

from core.errors import InferenceFailed, InferenceUnavailable, ServiceError, StorageUnavailable
from core.inference_client import AdapterRefused
from core.jobs.events import append_event
from core.logging import get_logger
from core.served_adapters import remove_from_servers
from core.storage import ObjectDamaged
from core.tables.models import Model
from sdft_engine.contract.served_attestation import Verdict
from worker.comparison import prove_on_servers
from worker.resources import Resources

LOOK_SECONDS = 3.0
LONGEST_DELAY_SECONDS = 60.0
LONGEST_REFUSED_DELAY_SECONDS = 3600.0
"""Of an adapter that the server itself refuses: until it is started with other options it will say the same."""
DIFFERED_DELAY_SECONDS = 600.0
"""Also at every start of a worker, which may come with other settings."""
MODELS_AT_A_TIME = 10

NOT_VERIFIABLE_NOW = (InferenceUnavailable, InferenceFailed, AdapterRefused)
"""What may be different later: the server is down, starting, or serves another base model at the moment."""

log = get_logger(__name__)


@dataclass
class Verifier:
    """Remembers when a model whose verification was not possible is tried again."""

    resources: Resources
    delays: dict[str, float] = field(default_factory=dict)
    not_before: dict[str, float] = field(default_factory=dict)

    def run(self) -> None:
        """The thread's loop, until the process ends."""
        while not self.resources.stopping.wait(LOOK_SECONDS):
            try:
                if self.resources.may_claim:
                    self.verify_waiting()
            except ServiceError as error:
                log.warning("database_unreachable", error=error.message)
            except Exception:
                log.exception("verification_failed_unexpectedly")

    def verify_waiting(self) -> int:
        """Verify the models that wait for it, those without a verdict first. Returns how many got a verdict."""
        with self.resources.database.reading() as session:
            waiting = session.scalars(select(Model).where(Model.status == "unverified").order_by(Model.attestation.is_not(None), Model.created_at)).all()
        due = [model for model in waiting if self.not_before.get(model.id, 0) <= time.monotonic()][:MODELS_AT_A_TIME]
        if not due or not self.resources.inference.healthy():
            return 0
        return sum(self._verify(model) for model in due if not self.resources.stopping.is_set())

    def _verify(self, model: Model) -> bool:
        try:
            verdict = prove_on_servers(self.resources, model)
        except (*NOT_VERIFIABLE_NOW, StorageUnavailable, ObjectDamaged, FileNotFoundError) as error:
            longest = LONGEST_REFUSED_DELAY_SECONDS if isinstance(error, AdapterRefused) else LONGEST_DELAY_SECONDS
            self.delays[model.id] = min(longest, 2 * self.delays.get(model.id, LOOK_SECONDS / 2))
            self.not_before[model.id] = time.monotonic() + self.delays[model.id]
            log.warning("model_not_verifiable", model=model.id, error=str(error), retry_seconds=self.delays[model.id])
            return False
        self.not_before[model.id] = time.monotonic() + DIFFERED_DELAY_SECONDS
        recorded = self._record(model, verdict)
        # A checkpoint is loaded again when somebody asks for it; what another worker was faster with, that one looks after.
        stays = (model.step is None and verdict.reason is None) if recorded else self._is_servable(model)
        if not stays:
            remove_from_servers(model, self.resources.settings.served_adapters_dir, self.resources.inference)
        return True

    def _record(self, model: Model, verdict: Verdict) -> bool:
        """Returns False where that is known already, or the model was deleted meanwhile."""
        status = "servable" if verdict.reason is None else "unverified"
        with self.resources.database.transaction() as session:
            recorded = session.execute(
                update(Model)
                .where(Model.id == model.id, Model.status == "unverified", Model.attestation.is_(None) if verdict.reason else true())
                .values(status=status, attestation=verdict.record)
                .returning(Model.id)
                .execution_options(synchronize_session=False)
            ).one_or_none()
            if recorded is None:
                return False
            if verdict.reason is not None:
                append_event(session, model.job_id, not_servable(model.id, verdict.reason), level="warn", data=verdict.record)
            elif model.step is None:
                append_event(session, model.job_id, f"{model.id} is verified and can be used now", data=verdict.record)
        log.info("model_verified", model=model.id, status=status, reason=verdict.reason)
        return True

    def _is_servable(self, model: Model) -> bool:
        with self.resources.database.reading() as session:
            return session.get_one(Model, model.id).status == "servable"


def not_servable(model_id: str, reason: str) -> str:
    return f"{model_id} can't be used for inference: {reason}. Its adapter can be downloaded"
