"""From the id that a client names to the name that the inference server knows."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

from api.state import ApiState
from core.errors import ModelNotFound
from core.tables.jobs import Job
from core.tables.models import Model


@dataclass(frozen=True)
class ServedModel:
    public_id: str
    serving_name: str
    adapter: Model | None
    """None for a base model."""
    temperature: float | None = None
    """What a request without one is sampled at. None: the inference server's default, 1."""


def find_served_model(state: ApiState, project_id: str, public_id: str) -> ServedModel:
    """Raises ModelNotFound for what is unknown, another project's, or not servable."""
    if state.settings.base_model(public_id) is not None:
        return ServedModel(public_id, public_id, None)
    with state.database.reading() as session:
        found = session.execute(
            select(Model, Job.resolved_hyperparameters)
            .join(Job, Job.id == Model.job_id)
            .where(Model.id == public_id, Model.project_id == project_id, Model.status != "deleted")
        ).one_or_none()
    if found is None:
        raise ModelNotFound(f"The model {public_id!r} does not exist", param="model")
    model, hyperparameters = found
    if model.status != "servable":
        reason = (model.attestation or {}).get("reason") or "the inference server's answers were not compared with the trainer's yet"
        advice = f"It is served once they match: see the events of its job {model.job_id}, or `sdft models get`"
        raise ModelNotFound(f"The model {public_id!r} is {model.status}: {reason}. {advice}", param="model")
    return ServedModel(public_id, model.serving_name, model, _trained_temperature(hyperparameters))


def _trained_temperature(hyperparameters: dict[str, Any] | None) -> float | None:
    """A model that learned from its own answers at a temperature is itself at that temperature; warmer, a small one rambles."""
    temperature = (hyperparameters or {}).get("temperature")
    return temperature if isinstance(temperature, int | float) else None
