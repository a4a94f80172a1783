import re
from typing import Annotated

from fastapi import Depends, Request
from sqlalchemy import bindparam, select

from api.fine_tuning.jobs.schemas import MAX_METADATA
from api.state import ProjectId, State
from core.errors import BadRequest, NotFound
from core.tables.jobs import Job

OWNED_JOB = select(Job).where(Job.id == bindparam("job_id"), Job.project_id == bindparam("project_id"))
"""Built once: polls are the most frequent requests, and building it takes longer than reading the row."""
METADATA_PARAMETER = re.compile(r"metadata\[(.*)\]", re.DOTALL)


def _owned_job(job_id: str, state: State, project_id: ProjectId) -> Job:
    with state.database.reading() as session:
        job = session.scalar(OWNED_JOB, {"job_id": job_id, "project_id": project_id})
    if job is None:
        raise NotFound(f"Could not find fine tune: {job_id}", code="fine_tune_not_found", param="fine_tuning_job_id")
    return job


async def _metadata_filter(request: Request) -> dict[str, str]:
    found = ((METADATA_PARAMETER.fullmatch(name), value) for name, value in request.query_params.items())
    wanted = {match[1]: value for match, value in found if match}
    if len(wanted) > MAX_METADATA:
        raise BadRequest(f"metadata: at most {MAX_METADATA} pairs", code="too_long", param="metadata")
    return wanted


OwnedJob = Annotated[Job, Depends(_owned_job)]
"""The job of the path, of the caller's project; 404 otherwise."""
MetadataFilter = Annotated[dict[str, str], Depends(_metadata_filter)]
"""`metadata[k]=v` of the query, as the OpenAI client writes it."""
