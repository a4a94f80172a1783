"""The row of a trained model, which is made before its archive and added when both are good."""

from core.database import unix_now
from core.ids import checkpoint_model_id, new_token, tuned_model_id
from core.tables.models import Model
from worker.run_preparation import PreparedRun


def new_trained_model(prepared: PreparedRun, step: int | None) -> Model:
    """The job's final model, or the one of its checkpoint at `step`: unverified, under a serving name that nobody had before.
    `store_adapter` fills in its archive."""
    job = prepared.job
    model_id = tuned_model_id(job.base_model, prepared.project_name, job.suffix, job.id)
    serving_name = new_token()
    return Model(
        id=model_id if step is None else checkpoint_model_id(model_id, step),
        project_id=job.project_id,
        job_id=job.id,
        base_model=job.base_model,
        parent_model=job.parent_model,
        step=step,
        status="unverified",
        serving_name=serving_name,
        storage_key=f"models/{serving_name}.tar.gz",
        attestation=None,
        created_at=unix_now(),
    )
