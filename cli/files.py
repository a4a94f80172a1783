"""`sdft files`: upload, list, get, delete, download."""

from pathlib import Path
from typing import Annotated

import typer

from cli import output
from cli.client import Client, Json, segment
from cli.downloads import download, file_name

app = typer.Typer(help="Training files and results.", no_args_is_help=True)
AsJson = Annotated[bool, typer.Option("--json", help="Print the server's JSON.")]
FileId = Annotated[str, typer.Argument(help="A file's id, as in `files list`.")]


def upload_file(client: Client, path: Path, purpose: str = "fine-tune") -> Json:
    with path.open("rb") as file:
        return client.upload("/files", path.name, file, {"purpose": purpose})


@app.command()
def upload(
    path: Annotated[Path, typer.Argument(help="A file on this machine.", exists=True, dir_okay=False, readable=True)],
    purpose: Annotated[str, typer.Option(help="What it is for.")] = "fine-tune",
    as_json: AsJson = False,
) -> None:
    """Upload a file, and print its id."""
    uploaded = upload_file(Client.from_environment(), path, purpose)
    output.print_json(uploaded) if as_json else print(output.clean(uploaded["id"]))


@app.command("list")
def list_files(
    limit: Annotated[int, typer.Option(min=1, help="How many at most, the newest first.")] = 20,
    purpose: Annotated[str | None, typer.Option(help="Only files of this purpose.")] = None,
    as_json: AsJson = False,
) -> None:
    """List files."""
    found = list(Client.from_environment().pages("/files", limit, **({"purpose": purpose} if purpose else {})))
    if as_json:
        output.print_json(found)
        return
    rows = ((f["id"], f["filename"], f["purpose"], output.byte_size(f["bytes"]), f["status"], output.local_time(f["created_at"])) for f in found)
    output.print_table(("id", "name", "purpose", "size", "status", "created"), rows)


@app.command()
def get(file_id: FileId, as_json: AsJson = False) -> None:
    """Show one file's record."""
    found = Client.from_environment().get(f"/files/{segment(file_id)}")
    output.print_json(found) if as_json else output.print_fields(found)


@app.command()
def delete(file_id: FileId) -> None:
    """Delete a file."""
    Client.from_environment().delete(f"/files/{segment(file_id)}")
    print(f"deleted {output.clean(file_id)}")


@app.command("download")
def download_file(
    file_id: FileId,
    target: Annotated[Path | None, typer.Option("--output", "-o", help="Where to. Default: the file's own name, here.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite.")] = False,
) -> None:
    """Download a file's content."""
    client = Client.from_environment()
    if target is None:
        target = Path(file_name(client.get(f"/files/{segment(file_id)}")["filename"], file_id))
    size_bytes = download(client, f"/files/{segment(file_id)}/content", target, overwrite=force)
    print(f"{target} ({output.byte_size(size_bytes)})")
