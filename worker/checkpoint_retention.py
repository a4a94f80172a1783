"""Which checkpoints are kept. One has two parts, each an object: the training state, from which its job can resume, and the model.

Training states serve an unfinished job alone, the newest ones. Models are for people, who compare and choose: all of a job's stay
until some time after its end, and of those the best and the last ones for good, and whatever somebody uses.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, Select, and_, func, select, update
from sqlalchemy.orm import Session

from core.database import unix_now
from core.errors import InferenceFailed, InferenceUnavailable
from core.jobs.events import append_event
from core.logging import get_logger
from core.served_adapters import remove_from_servers
from core.storage import discard
from core.tables.exports import ModelExport
from core.tables.jobs import TERMINAL_STATUSES, UNFINISHED_STATUSES, Checkpoint, Job
from core.tables.models import Model
from worker.resources import Resources
from worker.stored_objects import delete_unreferenced

LOSSES = ("full_valid_loss", "valid_loss")
"""What says which model is best, the first that was measured; lower is better."""

STATES_AT_A_TIME = 1000

log = get_logger(__name__)


def discard_superseded_states(resources: Resources) -> int:
    """Of unfinished jobs, all but the newest. One is enough to resume from; the others are for the case that it is damaged."""
    place = func.row_number().over(partition_by=Checkpoint.job_id, order_by=Checkpoint.step.desc()).label("place")
    states = select(Checkpoint.id, Checkpoint.storage_key, place).join(Job, Job.id == Checkpoint.job_id)
    ranked = states.where(Checkpoint.storage_key.is_not(None), Job.status.in_(UNFINISHED_STATUSES)).subquery()
    return _discard_states(resources, select(ranked.c.id, ranked.c.storage_key).where(ranked.c.place > resources.settings.keep_checkpoints))


def discard_states_of_ended_jobs(resources: Resources) -> int:
    states = select(Checkpoint.id, Checkpoint.storage_key).join(Job, Job.id == Checkpoint.job_id)
    return _discard_states(resources, states.where(Checkpoint.storage_key.is_not(None), Job.status.in_(TERMINAL_STATUSES)))


def _discard_states(resources: Resources, states: Select[str, str | None]) -> int:
    """In batches: a statement takes only so many parameters, and the writes of others wait for each."""
    with resources.database.reading() as session:
        found = [(row.id, row.storage_key) for row in session.execute(states)]
    return sum(_discard_batch(resources, dict(found[start : start + STATES_AT_A_TIME])) for start in range(0, len(found), STATES_AT_A_TIME))


def _discard_batch(resources: Resources, found: dict[str, str]) -> int:
    """Rows first: nobody looks for a state that its row does not name."""
    with resources.database.transaction() as session:
        as_found = Checkpoint.storage_key.in_(found.values())  # a resumed attempt may have written the step anew
        discarded = update(Checkpoint).where(Checkpoint.id.in_(found), as_found).values(storage_key=None).returning(Checkpoint.id)
        ids = session.scalars(discarded.execution_options(synchronize_session=False)).all()
    delete_unreferenced(resources.database, resources.storage, [found[checkpoint_id] for checkpoint_id in ids])
    return len(ids)


def delete_surplus_models(resources: Resources) -> int:
    """Checkpoint models of jobs that ended long enough ago. Postponed where an inference server can't say what it serves."""
    settings = resources.settings
    of_checkpoints = select(Model.job_id).where(Model.step.is_not(None), Model.status != "deleted").group_by(Model.job_id)
    ended = and_(Job.status.in_(TERMINAL_STATUSES), Job.finished_at < unix_now() - settings.keep_runs_seconds)
    many = of_checkpoints.join(Job, Job.id == Model.job_id).where(ended).having(func.count() > settings.keep_checkpoints)
    with resources.database.reading() as session:
        job_ids = session.scalars(many).all()
    if not job_ids:
        return 0
    try:
        served = {name for client in resources.inference.clients for name in client.served_names()}
    except (InferenceUnavailable, InferenceFailed) as error:
        log.warning("surplus_models_kept", reason=error.message)
        return 0
    return sum(_delete_surplus(resources, job_id, served) for job_id in job_ids)


def _delete_surplus(resources: Resources, job_id: str, served: set[str]) -> int:
    keep = resources.settings.keep_checkpoints
    with resources.database.transaction() as session:
        ranked = surplus(_checkpoint_models(session, job_id), keep)
        deleted = [model for model in ranked if model.serving_name not in served and _may_go(session, model)]
        for model in deleted:
            model.status = "deleted"
        if deleted:
            steps = ", ".join(str(model.step) for model in deleted)
            which = f"step {steps} was" if len(deleted) == 1 else f"steps {steps} were"
            append_event(session, job_id, f"The checkpoint models of {which} deleted; the best, the last {keep} and those in use are kept")
    for model in deleted:
        remove_from_servers(model, resources.settings.served_adapters_dir, resources.inference)
        discard(resources.storage, model.storage_key)
    return len(deleted)


def _checkpoint_models(session: Session, job_id: str) -> Sequence[Row[Model, dict[str, Any]]]:
    of_model = and_(Checkpoint.job_id == Model.job_id, Checkpoint.step == Model.step)
    rows = select(Model, Checkpoint.metrics).outerjoin(Checkpoint, of_model).where(Model.job_id == job_id)
    return session.execute(rows.where(Model.step.is_not(None), Model.status != "deleted").order_by(Model.step)).all()


def surplus(models: Sequence[Row[Model, dict[str, Any]]], keep: int) -> list[Model]:
    """All but the last `keep` and the best one. `models` with the metrics of their checkpoints, by step."""
    best = next((found for loss in LOSSES if (found := _lowest(models, loss)) is not None), None)
    return [model for model, _ in models[:-keep] if model is not best]


def _lowest(models: Sequence[Row[Model, dict[str, Any]]], loss: str) -> Model | None:
    measured = [(metrics[loss], model) for model, metrics in models if metrics and metrics.get(loss) is not None]
    return min(measured, key=lambda pair: pair[0])[1] if measured else None


def _may_go(session: Session, model: Model) -> bool:
    """Locks the row first: a job that continues from the model locks it too before it is created, and so does an export."""
    if session.scalar(select(Model.id).where(Model.id == model.id, Model.status != "deleted").with_for_update()) is None:
        return False
    continued = session.scalar(select(Job.id).where(Job.parent_model == model.id).limit(1))
    exported = session.scalar(select(ModelExport.format).where(ModelExport.model_id == model.id).limit(1))
    return continued is None and exported is None
