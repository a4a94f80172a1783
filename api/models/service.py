"""Base models of the catalogue, and the tuned models of a project."""

from collections.abc import Iterable

from sqlalchemy import delete, select
from sqlalchemy.orm import Session, aliased

from api.models.schemas import AdapterFormat, ModelObject
from api.state import ApiState
from core.audit import Actor, record
from core.base_models import PREPARED_MARK, BaseModelEntry
from core.errors import BadRequest, Conflict, ModelNotFound
from core.ids import model_file_name
from core.served_adapters import remove_from_servers
from core.settings import Settings
from core.storage import StoredObject, discard
from core.tables.exports import ModelExport
from core.tables.jobs import TERMINAL_STATUSES, Job
from core.tables.models import Model


def list_models(state: ApiState, project_id: str) -> list[ModelObject]:
    """The catalogue's base models, then the project's servable models, newest first."""
    servable = select(Model).where(Model.project_id == project_id, Model.status == "servable").order_by(Model.created_at.desc(), Model.id)
    with state.database.reading() as session:
        models = session.scalars(servable).all()
        parents = _parents_of(session, models)
    return [*(base_model_object(entry, state.settings) for entry in state.settings.base_models), *(tuned_model_object(model, parents) for model in models)]


def get_model(state: ApiState, project_id: str, model_id: str) -> ModelObject:
    """Raises ModelNotFound, also for another project's."""
    entry = state.settings.base_model(model_id)
    if entry is not None:
        return base_model_object(entry, state.settings)
    with state.database.reading() as session:
        model = find_tuned_model(session, project_id, model_id)
        return tuned_model_object(model, _parents_of(session, [model]))


def get_tuned_model(state: ApiState, project_id: str, model_id: str) -> Model:
    """Raises ModelNotFound, and BadRequest on a base model, which has no adapter."""
    if state.settings.base_model(model_id) is not None:
        raise BadRequest(f"{model_id} is a base model: it has no adapter and can't be deleted", code="base_model", param="model")
    with state.database.reading() as session:
        return find_tuned_model(session, project_id, model_id)


def find_tuned_model(session: Session, project_id: str, model_id: str) -> Model:
    """The project's model in any state but deleted. Raises ModelNotFound."""
    model = session.scalar(select(Model).where(Model.id == model_id, Model.project_id == project_id, Model.status != "deleted"))
    if model is None:
        raise ModelNotFound(f"The model {model_id!r} does not exist", param="model")
    return model


def delete_model(state: ApiState, model: Model, actor: Actor) -> None:
    """The row stays as `deleted`, for the lineage of others; the weights go. Raises Conflict while an unfinished job
    continues from it."""
    with state.database.transaction() as session:
        locked = session.scalar(select(Model).where(Model.id == model.id, Model.status != "deleted").with_for_update())
        if locked is None:
            raise ModelNotFound(f"The model {model.id!r} does not exist", param="model")
        continued = select(Job.id).where(Job.parent_model == model.id, Job.status.not_in(TERMINAL_STATUSES)).limit(1)
        if job_id := session.scalar(continued):
            raise Conflict(f"the unfinished job {job_id} continues from {model.id}; cancel the job first", code="model_in_use", param="model")
        locked.status = "deleted"
        record(session, actor, "model.deleted", project_id=model.project_id, object_id=model.id)
        exports = session.scalars(delete(ModelExport).where(ModelExport.model_id == model.id).returning(ModelExport.storage_key)).all()
    remove_from_servers(model, state.settings.served_adapters_dir, state.inference)
    for key in (model.storage_key, *exports):
        if key is not None:  # an export that is not made yet
            discard(state.storage, key)


def stored_adapter(model: Model) -> StoredObject:
    return StoredObject(model.storage_key, model.archive_bytes, model.archive_sha256)


def archive_name(model: Model, form: AdapterFormat) -> str:
    """What a downloaded model is called."""
    name = model_file_name(model.id)
    return f"{name}.tar.gz" if form == "peft" else f"{name}.{form}.tar.gz"


def base_model_object(entry: BaseModelEntry, settings: Settings) -> ModelObject:
    """`created` is when its weights were converted, 0 before."""
    mark = entry.directory(settings.cache_dir) / PREPARED_MARK
    prepared = mark.exists()
    return ModelObject(
        id=entry.id,
        created=int(mark.stat().st_mtime) if prepared else 0,
        owned_by="system",
        parent=None,
        root=entry.id,
        base_model=entry.id,
        job_id=None,
        step=None,
        lineage=[],
        status="servable" if prepared else "not_prepared",
        attestation=None,
    )


def tuned_model_object(model: Model, parents: dict[str, str | None]) -> ModelObject:
    return ModelObject(
        id=model.id,
        created=int(model.created_at),
        owned_by=model.project_id,
        parent=model.parent_model or model.base_model,
        root=model.base_model,
        base_model=model.base_model,
        job_id=model.job_id,
        step=model.step,
        lineage=_lineage(model, parents),
        status=model.status,
        attestation=model.attestation,
    )


def _lineage(model: Model, parents: dict[str, str | None]) -> list[str]:
    ancestors: list[str] = []
    parent = model.parent_model
    while parent is not None and parent not in ancestors:
        ancestors.append(parent)
        parent = parents.get(parent)
    return [model.base_model, *reversed(ancestors)]


def _parents_of(session: Session, models: Iterable[Model]) -> dict[str, str | None]:
    """The parent of every ancestor of these models, deleted ones too."""
    wanted = {model.parent_model for model in models if model.parent_model is not None}
    if not wanted:
        return {}
    ancestors = select(Model.id, Model.parent_model).where(Model.id.in_(wanted)).cte("ancestors", recursive=True)
    older = aliased(Model)
    ancestors = ancestors.union(select(older.id, older.parent_model).join(ancestors, older.id == ancestors.c.parent_model))
    return {row.id: row.parent_model for row in session.execute(select(ancestors.c.id, ancestors.c.parent_model))}
