"""`sdft projects`: list, create, update, archive. They need a key with the scope admin."""

from typing import Annotated

import typer

from cli import output
from cli.client import Client, Json, segment
from cli.errors import CliError
from cli.files import AsJson

PROJECTS = "/organization/projects"

app = typer.Typer(help="Projects of the server (needs a key with the scope admin).", no_args_is_help=True)
ProjectName = Annotated[str, typer.Argument(metavar="PROJECT", help="A project's name or id, as in `projects list`.")]
MaxRunningJobs = Annotated[int | None, typer.Option(min=1, help="How many of its jobs may train at a time.")]


def project_path(client: Client, name_or_id: str) -> str:
    """The project's own path on the server. Raises CliError where there is none."""
    for project in client.pages(PROJECTS, None, include_archived=True):
        if name_or_id in (project["id"], project["name"]):
            return f"{PROJECTS}/{segment(project['id'])}"
    raise CliError(f"there is no project {name_or_id}; see `sdft projects list`")


@app.command("list")
def list_projects(archived: Annotated[bool, typer.Option("--archived", help="Archived ones too.")] = False, as_json: AsJson = False) -> None:
    """List projects, the newest first."""
    found = list(Client.from_environment().pages(PROJECTS, None, include_archived=archived))
    if as_json:
        output.print_json(found)
        return
    rows = ((p["id"], p["name"], p["status"], p.get("max_running_jobs"), output.local_time(p["created_at"])) for p in found)
    output.print_table(("id", "name", "status", "running jobs at most", "created"), rows)


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Becomes part of its models' names.")], max_running_jobs: MaxRunningJobs = None, as_json: AsJson = False
) -> None:
    """Make a project, and print its id."""
    body: Json = {"name": name} | ({"max_running_jobs": max_running_jobs} if max_running_jobs is not None else {})
    project = Client.from_environment().post(PROJECTS, body)
    output.print_json(project) if as_json else print(output.clean(project["id"]))


@app.command()
def update(
    project: ProjectName,
    name: Annotated[str | None, typer.Option(help="A new name; models keep the old one in theirs.")] = None,
    max_running_jobs: MaxRunningJobs = None,
    as_json: AsJson = False,
) -> None:
    """Change a project's name or limit."""
    body: Json = {"name": name} if name is not None else {}
    body |= {"max_running_jobs": max_running_jobs} if max_running_jobs is not None else {}
    if not body:
        raise CliError("nothing to change: give --name or --max-running-jobs")
    client = Client.from_environment()
    changed = client.post(project_path(client, project), body)
    output.print_json(changed) if as_json else output.print_fields(changed)


@app.command()
def archive(project: ProjectName) -> None:
    """Archive a project: its keys open nothing any more, its jobs go on, its models stay."""
    client = Client.from_environment()
    archived = client.post(f"{project_path(client, project)}/archive")
    print(f"archived {output.clean(archived['name'])}; its keys open nothing any more")
