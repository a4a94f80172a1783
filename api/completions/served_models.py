"""From the id that a client names to the name that the inference server knows."""

from dataclasses import dataclass

from sqlalchemy import select

from api.state import ApiState
from core.errors import ModelNotFound
from core.tables.models import Model


@dataclass(frozen=True)
class ServedModel:
    public_id: str
    serving_name: str
    adapter: Model | None
    """None for a base model."""


def find_served_model(state: ApiState, project_id: str, public_id: str) -> ServedModel:
    """Raises ModelNotFound for what is unknown, another project's, or not servable."""
    if state.settings.base_model(public_id) is not None:
        return ServedModel(public_id, public_id, None)
    with state.database.reading() as session:
        model = session.scalar(select(Model).where(Model.id == public_id, Model.project_id == project_id, Model.status != "deleted"))
    if model is None:
        raise ModelNotFound(f"The model {public_id!r} does not exist", param="model")
    if model.status != "servable":
        raise ModelNotFound(f"The model {public_id!r} is {model.status}: it is served once the inference server's answers match the trainer's", param="model")
    return ServedModel(public_id, model.serving_name, model)
