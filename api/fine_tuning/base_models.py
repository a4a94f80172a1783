"""GET /fine_tuning/base_models: what can be trained here."""

from typing import Literal

from fastapi import APIRouter

from api.fine_tuning.jobs.method import METHODS
from api.pagination import Identified, Page, page_of
from api.state import State

router = APIRouter(prefix="/v1/fine_tuning/base_models", tags=["fine-tuning"])


class BaseModelObject(Identified):
    object: Literal["fine_tuning.base_model"] = "fine_tuning.base_model"
    prepared: bool
    """Whether its weights are converted already; else the first use does that."""
    methods: list[str]


@router.get("")
def list_base_models(state: State) -> Page[BaseModelObject]:
    settings = state.settings
    return page_of([BaseModelObject(id=entry.id, prepared=entry.is_prepared(settings.cache_dir), methods=list(METHODS)) for entry in settings.base_models])
