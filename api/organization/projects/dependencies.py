from typing import Annotated

from fastapi import Depends

from api.state import State
from core.errors import NotFound
from core.tables.projects import Project


def _known_project(project_id: str, state: State) -> Project:
    with state.database.reading() as session:
        project = session.get(Project, project_id)
    if project is None:
        raise NotFound(f"No such project: {project_id}", code="project_not_found", param="project_id")
    return project


KnownProject = Annotated[Project, Depends(_known_project)]
"""The project of the path, archived or not; 404 otherwise."""
