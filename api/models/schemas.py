"""Models on the wire: base models of the catalogue and the project's own."""

from typing import Any, Literal

from pydantic import BaseModel

from api.pagination import Identified

AdapterFormat = Literal["peft", "merged", "gguf"]


class ModelObject(Identified):
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    parent: str | None
    """The model it was trained from."""
    root: str
    """The base model, as vLLM names it."""
    base_model: str
    job_id: str | None
    step: int | None
    """Set where it is a checkpoint of its job."""
    lineage: list[str]
    """What it was trained from, the base model first."""
    status: str
    attestation: dict[str, Any] | None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelObject]


class DeletedModel(BaseModel):
    id: str
    object: Literal["model"] = "model"
    deleted: bool
