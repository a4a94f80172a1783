"""Projects on the wire, as OpenAI's administration has them."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.pagination import Identified
from core.tables.projects import Project

MaxRunningJobs = Annotated[int, Field(ge=1, le=100_000)]


class CreateProject(BaseModel):
    """The name's form is checked in core.projects."""

    model_config = ConfigDict(strict=True)

    name: str
    max_running_jobs: MaxRunningJobs | None = None


class UpdateProject(BaseModel):
    """What is not given stays. A null `max_running_jobs` goes back to the server's setting."""

    model_config = ConfigDict(strict=True)

    name: str | None = None
    max_running_jobs: MaxRunningJobs | None = None


class ProjectObject(Identified):
    object: Literal["organization.project"] = "organization.project"
    name: str
    created_at: int
    archived_at: int | None
    status: Literal["active", "archived"]
    max_running_jobs: int | None
    """How many of its jobs may train at a time; null: as the server's settings say."""


def project_object(project: Project) -> ProjectObject:
    return ProjectObject(
        id=project.id,
        name=project.name,
        created_at=int(project.created_at),
        archived_at=None if project.archived_at is None else int(project.archived_at),
        status="active" if project.archived_at is None else "archived",
        max_running_jobs=project.max_running_jobs,
    )
