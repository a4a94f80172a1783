"""`sdft keys`: list, create, revoke. They need a key with the scope admin."""

import re
from typing import Annotated

import typer

from cli import output
from cli.client import Client, Json, segment
from cli.errors import CliError
from cli.files import AsJson
from cli.projects import ProjectName, project_path

app = typer.Typer(help="API keys of projects (needs a key with the scope admin).", no_args_is_help=True)
UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@app.command("list")
def list_keys(project: ProjectName, as_json: AsJson = False) -> None:
    """List a project's keys, without their secrets."""
    client = Client.from_environment()
    found = list(client.pages(f"{project_path(client, project)}/api_keys", None))
    if as_json:
        output.print_json(found)
        return
    columns = ("id", "name", "scopes", "created", "last used", "expires")
    times = ("created_at", "last_used_at", "expires_at")
    output.print_table(columns, ((k["id"], k["name"], " ".join(k["scopes"]), *(output.local_time(k.get(time)) for time in times)) for k in found))


@app.command()
def create(
    project: ProjectName,
    name: Annotated[str, typer.Argument(help="Whose or what it is for.")],
    scope: Annotated[list[str] | None, typer.Option(help="read, write, infer or admin; may be given again. Default: read, write and infer.")] = None,
    expires_in: Annotated[str | None, typer.Option(metavar="DURATION", help="Such as 90d, 12h or 30m. Default: never.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key, and print it: this is the only time that anybody sees it."""
    body: Json = {"name": name}
    body |= {"scopes": scope} if scope else {}
    body |= {"expires_in_seconds": seconds_of(expires_in)} if expires_in is not None else {}
    client = Client.from_environment()
    key = client.post(f"{project_path(client, project)}/api_keys", body)
    if as_json:
        output.print_json(key)
        return
    print(output.clean(key["value"]), flush=True)
    typer.echo("keep it: it is not shown again", err=True)


@app.command()
def revoke(project: ProjectName, key_id: Annotated[str, typer.Argument(help="A key's id, as in `keys list`.")]) -> None:
    """Revoke a key: within seconds it opens nothing any more."""
    client = Client.from_environment()
    client.delete(f"{project_path(client, project)}/api_keys/{segment(key_id)}")
    print(f"revoked {output.clean(key_id)}")


def seconds_of(duration: str) -> int:
    """90d, 12h, 30m or 45s. Raises CliError."""
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", duration)
    if match is None:
        raise CliError(f"--expires-in {duration}: write it as 90d, 12h, 30m or 45s")
    return int(match[1]) * UNIT_SECONDS[match[2]]
