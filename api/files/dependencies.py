from typing import Annotated

from fastapi import Depends

from api.files.service import find_file
from api.state import ProjectId, State
from core.errors import NotFound
from core.tables.files import File


def _owned_file(file_id: str, state: State, project_id: ProjectId) -> File:
    with state.database.reading() as session:
        file = find_file(session, project_id, file_id)
    if file is None:
        raise NotFound(f"No such File object: {file_id}", param="file_id")
    return file


OwnedFile = Annotated[File, Depends(_owned_file)]
"""The file of the path, of the caller's project; 404 otherwise."""
