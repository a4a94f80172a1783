"""Models become servable here: loaded into the inference servers and compared with what the trainer measured.

The final model of a job is verified while the job is published; checkpoints, and models whose server could not be reached
then, by a thread that looks for them every few seconds. A model that failed the comparison is tried again too, but rarely: its
bytes never change, and yet the server may have been the one that was wrong, in another precision say.
"""

from typing import Any

from sqlalchemy import ColumnElement, or_, select, true, update

from core.database import database_now
from core.errors import InferenceFailed, InferenceUnavailable, ServiceError, StorageFull, StorageUnavailable
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
CLAIM_SECONDS = 300.0
"""Well above what loading and comparing one model takes; then another worker may take up what this one's end left."""
MODELS_AT_A_TIME = 10

NOT_VERIFIABLE_NOW = (InferenceUnavailable, InferenceFailed, AdapterRefused, StorageFull)
"""What may be different later: the server is down, starting, or serves another base model at the moment; or there is no space to unpack
the adapter."""

log = get_logger(__name__)


class Verifier:
    """Claims models one by one, by their rows: what one worker verifies the others leave alone."""

    def __init__(self, resources: Resources) -> None:
        self.resources = resources
        self._has_looked = False

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
        """Verify the models that are due, those without a verdict first. Returns how many got a verdict."""
        if not self._has_looked:
            self._hurry()
            self._has_looked = True
        with self.resources.database.reading() as session:
            is_due = session.scalar(select(Model.id).where(*self._due()).limit(1)) is not None
        if not is_due or not self.resources.inference.healthy():
            return 0
        verdicts = 0
        for _ in range(MODELS_AT_A_TIME):
            model = None if self.resources.stopping.is_set() else self._claim()
            if model is None:
                break
            verdicts += self._verify(model)
        return verdicts

    def _due(self) -> tuple[ColumnElement[bool], ...]:
        """What a base model's catalogue no longer names can't be verified, and waits until it does."""
        bases = [entry.id for entry in self.resources.settings.base_models]
        return Model.status == "unverified", or_(Model.verify_after.is_(None), Model.verify_after <= database_now()), Model.base_model.in_(bases)

    def _hurry(self) -> None:
        """Whatever waits for longer than a claim lasts is due now: this worker may have come with other settings."""
        with self.resources.database.transaction() as session:
            waits = (Model.status == "unverified", Model.verify_after > database_now() + CLAIM_SECONDS)
            session.execute(update(Model).where(*waits).values(verify_after=None).execution_options(synchronize_session=False))

    def _claim(self) -> Model | None:
        """Put the next one's turn off, before anything is done with it: neither another worker nor a failure that nobody foresaw meets
        it again soon."""
        with self.resources.database.transaction() as session:
            first = select(Model.id).where(*self._due()).order_by(Model.attestation.is_not(None), Model.created_at).limit(1)
            model_id = session.scalar(first.with_for_update(skip_locked=True))
            if model_id is None:
                return None
            turn = {"verify_after": database_now() + CLAIM_SECONDS, "verification_attempts": Model.verification_attempts + 1}
            session.execute(update(Model).where(Model.id == model_id).values(turn).execution_options(synchronize_session=False))
            return session.get_one(Model, model_id)

    def _verify(self, model: Model) -> bool:
        try:
            verdict = prove_on_servers(self.resources, model)
        except (*NOT_VERIFIABLE_NOW, StorageUnavailable, ObjectDamaged, FileNotFoundError) as error:
            longest = LONGEST_REFUSED_DELAY_SECONDS if isinstance(error, AdapterRefused) else LONGEST_DELAY_SECONDS
            delay_seconds = min(longest, LOOK_SECONDS * 2 ** min(model.verification_attempts - 1, 20))
            self._put_off(model, verify_after=database_now() + delay_seconds)
            log.warning("model_not_verifiable", model=model.id, error=str(error), retry_seconds=delay_seconds)
            return False
        self._put_off(model, verify_after=database_now() + DIFFERED_DELAY_SECONDS, verification_attempts=0)
        recorded = self._record(model, verdict)
        # A checkpoint is loaded again when somebody asks for it; what another worker was faster with, that one looks after.
        stays = (model.step is None and verdict.reason is None) if recorded else self._is_servable(model)
        if not stays:
            remove_from_servers(model, self.resources.settings.served_adapters_dir, self.resources.inference)
        return True

    def _put_off(self, model: Model, **columns: Any) -> None:
        with self.resources.database.transaction() as session:
            session.execute(update(Model).where(Model.id == model.id).values(**columns).execution_options(synchronize_session=False))

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
