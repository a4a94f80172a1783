"""`sdft models`: list, get, delete, download."""

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cli import output
from cli.client import Client, segment
from cli.downloads import download, file_name
from cli.errors import ServerRefused
from cli.files import AsJson

IN_PROGRESS = "export_in_progress"
AGAIN_SECONDS = 2.0
"""The server waits itself before it says so."""


class Form(StrEnum):
    peft = "peft"
    merged = "merged"
    gguf = "gguf"


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
    """Delete a tuned model and its adapter. The checkpoints of its job are models of their own, and stay."""
    Client.from_environment().delete(f"/models/{segment(model)}")
    print(f"deleted {output.clean(model)}; its job's other models, such as checkpoints, stay")


@app.command("download")
def download_model(
    model: ModelId,
    target: Annotated[Path | None, typer.Option("--output", "-o", help="Where to. Default: the model's id as a file name, here.")] = None,
    form: Annotated[Form, typer.Option("--format", help="The adapter alone, the model with it merged in, or that for llama.cpp.")] = Form.peft,
    force: Annotated[bool, typer.Option("--force", help="Overwrite.")] = False,
) -> None:
    """Download a tuned model as a tar.gz: its adapter, or a form that the server makes first.

    The adapter is for PEFT and for vLLM's --lora-modules, with --max-lora-rank at least its rank. On a CPU vLLM mixes adapters up
    unless vllm_plugin/ is installed with it and VLLM_PLUGINS=sdft_cpu_lora is set: docs/api.md, "Downloading a model".
    """
    if target is None:
        ending = "tar.gz" if form is Form.peft else f"{form.value}.tar.gz"
        target = Path(file_name(f"{model.replace(':', '-').replace('/', '-')}.{ending}", f"model.{ending}"))
    client, asked_at = Client.from_environment(), time.monotonic()
    if form is not Form.peft:
        typer.echo(f"the server makes the {form.value} form first unless it has it, which can take minutes", err=True)
    while True:
        try:
            size_bytes = download(client, f"/models/{segment(model)}/adapter", target, overwrite=force, format=form.value)
            break
        except ServerRefused as error:
            if error.code != IN_PROGRESS:
                raise
            typer.echo(f"the server is making it, for {time.monotonic() - asked_at:.0f} s now …", err=True)
            time.sleep(AGAIN_SECONDS)
    print(f"{target} ({output.byte_size(size_bytes)})")
