"""`sdft models`: list, get, delete, download."""

from pathlib import Path
from typing import Annotated

import typer

from cli import output
from cli.client import Client, segment
from cli.downloads import download, file_name
from cli.files import AsJson

app = typer.Typer(help="Base models and tuned models.", no_args_is_help=True)
ModelId = Annotated[str, typer.Argument(help="A model's id, as in `models list`.")]


@app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """List the models that can be chatted with."""
    found = Client.from_environment().get("/models")["data"]
    if as_json:
        output.print_json(found)
        return
    rows = ((m["id"], m.get("status"), m.get("base_model"), m.get("job_id"), output.local_time(m.get("created"))) for m in found)
    output.print_table(("id", "status", "base model", "job", "created"), rows)


@app.command()
def get(model: ModelId, as_json: AsJson = False) -> None:
    """Show one model's record."""
    found = Client.from_environment().get(f"/models/{segment(model)}")
    output.print_json(found) if as_json else output.print_fields(found)


@app.command()
def delete(model: ModelId) -> None:
    """Delete a tuned model and its adapter."""
    Client.from_environment().delete(f"/models/{segment(model)}")
    print(f"deleted {output.clean(model)}")


@app.command("download")
def download_model(
    model: ModelId,
    target: Annotated[Path | None, typer.Option("--output", "-o", help="Where to. Default: the model's id as a file name, here.")] = None,
    form: Annotated[str, typer.Option("--format", help="Form of the weights.")] = "peft",
    force: Annotated[bool, typer.Option("--force", help="Overwrite.")] = False,
) -> None:
    """Download a tuned model's adapter (a tar.gz that PEFT and vLLM load)."""
    if target is None:
        target = Path(file_name(f"{model.replace(':', '-').replace('/', '-')}.tar.gz", "adapter.tar.gz"))
    size_bytes = download(Client.from_environment(), f"/models/{segment(model)}/adapter", target, overwrite=force, format=form)
    print(f"{target} ({output.byte_size(size_bytes)})")
