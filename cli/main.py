"""The `sdft` command."""

from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated

import typer

from cli import chat, files, jobs, keys, models, projects, webhooks
from cli.errors import OneLineErrors

app = typer.Typer(cls=OneLineErrors, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
app.add_typer(files.app, name="files")
app.add_typer(jobs.app, name="jobs")
app.add_typer(models.app, name="models")
app.add_typer(projects.app, name="projects")
app.add_typer(keys.app, name="keys")
app.add_typer(webhooks.app, name="webhooks")
app.command()(chat.chat)

DataDir = Annotated[Path | None, typer.Option(help="Where the service keeps everything. Default: SDFT_DATA_DIR, else ./sdft-data.")]
Host = Annotated[str | None, typer.Option(help="Address to listen on. Default: SDFT_HOST, else 127.0.0.1.")]
Port = Annotated[int | None, typer.Option(min=1, max=65_535, help="Port to listen on. Default: SDFT_PORT, else 8000.")]

Inference = Annotated[str | None, typer.Option(help="Inference server: embedded or vllm (see make vllm). Default: SDFT_INFERENCE, else embedded.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sdft {installed_version('sdft')}")
        raise typer.Exit


@app.callback()
def sdft(version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False) -> None:
    """Fine-tune by self-distillation on your own machine.

    The server's address and key come from SDFT_BASE_URL and SDFT_API_KEY, else OPENAI_BASE_URL and OPENAI_API_KEY.
    """


@app.command()
def up(data_dir: DataDir = None, host: Host = None, port: Port = None, inference: Inference = None) -> None:
    """Start the whole service on this machine, and keep it running until Ctrl-C, which may take a minute to stop it."""
    from local_stack.up import run_up  # only here: the other commands must start fast

    raise typer.Exit(run_up(data_dir, host, port, inference))


@app.command()
def doctor(data_dir: DataDir = None, host: Host = None, port: Port = None, inference: Inference = None) -> None:
    """Say what would keep `sdft up` from working here, and how to mend it."""
    from local_stack.doctor import examine

    findings = examine(data_dir, host, port, inference)
    for finding in findings:
        if finding.problem is None:
            print(f"ok       {finding.what}")
        else:
            print(f"{'problem' if finding.hinders else 'warning'}  {finding.what}: {finding.problem}\n         mend it: {finding.mend}")
    raise typer.Exit(1 if any(finding.hinders for finding in findings) else 0)


if __name__ == "__main__":
    app()
