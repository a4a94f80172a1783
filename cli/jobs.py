"""`sdft jobs`: create, list, get, cancel, events, watch."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import output
from cli.client import Client, Json, segment
from cli.errors import CliError, ServerRefused
from cli.files import AsJson, upload_file
from cli.watch import watch as watch_job

app = typer.Typer(help="Fine-tuning jobs.", no_args_is_help=True)
JobId = Annotated[str, typer.Argument(help="A job's id, as in `jobs list`.")]
JOBS = "/fine_tuning/jobs"
NO_HYPERPARAMETERS = {"teacher_template": "--teacher-template", "sampler": "--sampler"}
"""What stands beside the hyperparameters in `method.sdft`, and its option here."""


@app.command()
def create(
    model: Annotated[str, typer.Argument(help="A base model, or a tuned model to continue from.")],
    training_file: Annotated[str, typer.Argument(metavar="FILE_OR_ID", help="A JSONL file on this machine (it is uploaded), or an uploaded file's id.")],
    validation_file: Annotated[str | None, typer.Option(metavar="FILE_OR_ID", help="Rows that are measured, never trained on.")] = None,
    method: Annotated[str | None, typer.Option(help="sdft or supervised. Default: the server's; sdft with a teacher template or sampler.")] = None,
    suffix: Annotated[str | None, typer.Option(help="Part of the tuned model's name.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the job repeatable.")] = None,
    hp: Annotated[list[str] | None, typer.Option("--hp", metavar="KEY=VALUE", help="A hyperparameter; may be given again.")] = None,
    teacher_template: Annotated[
        str | None, typer.Option(help="How the teacher sees the demonstration: example, history, history_twice, or a template.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="Who samples the rollouts: in_process (the trainer), or vllm where the server has it. Sdft only.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job until it ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Start a job, and print its id."""
    training = training_fields(method, dict(parse_pair(pair) for pair in hp or []), {"teacher_template": teacher_template, "sampler": sampler})
    files = {"training_file": training_file} | ({"validation_file": validation_file} if validation_file is not None else {})
    for file_or_id in files.values():
        _require_file_or_id(file_or_id)
    body: Json = {"model": model, **training}
    body |= {"suffix": suffix} if suffix is not None else {}
    body |= {"seed": seed} if seed is not None else {}
    client = Client.from_environment()
    job = _create_with_files(client, body, files)
    output.print_json(job) if as_json else print(output.clean(job["id"]), flush=True)
    if watch:
        raise typer.Exit(watch_job(client, job["id"]))


def parse_pair(pair: str) -> tuple[str, Any]:
    """`key=value`; a value that is JSON (a number, true, null) becomes that, any other stays text."""
    key, equals, text = pair.partition("=")
    if not key or not equals:
        raise CliError(f"--hp {pair}: write it as key=value")
    if key in NO_HYPERPARAMETERS:
        raise CliError(f"--hp {pair}: {key} is no hyperparameter; write {NO_HYPERPARAMETERS[key]} {text}")
    try:
        return key, json.loads(text)
    except ValueError:
        return key, text


def training_fields(method: str | None, hyperparameters: Json, sdft_options: dict[str, str | None]) -> Json:
    """How to train, as the job's request says it. Without a method the hyperparameters are for the server's default one, unless
    an option that only sdft has (a teacher template, a sampler) makes it sdft."""
    given = {name: value for name, value in sdft_options.items() if value is not None}
    if method is None and not given:
        return {"hyperparameters": hyperparameters} if hyperparameters else {}
    kind = method or "sdft"
    section: Json = {"hyperparameters": hyperparameters} if hyperparameters else {}
    return {"method": {"type": kind, kind: section | given}}


def _require_file_or_id(file_or_id: str) -> None:
    if not Path(file_or_id).is_file() and not file_or_id.startswith("file-"):
        raise CliError(f"{file_or_id} is neither a file on this machine nor the id of an uploaded one (file-…)")


def _create_with_files(client: Client, body: Json, files: dict[str, str]) -> Json:
    """The new job. Files of this machine are uploaded for it; where the server refuses it, they are deleted again."""
    uploaded: list[str] = []
    try:
        for field, file_or_id in files.items():
            body[field] = file_or_id
            if Path(file_or_id).is_file():
                body[field] = str(upload_file(client, Path(file_or_id))["id"])
                uploaded.append(body[field])
                typer.echo(f"uploaded {file_or_id} as {output.clean(body[field])}", err=True)
        return client.post(JOBS, body)
    except ServerRefused as refusal:
        if refusal.status < 500:  # after any other error the job may exist all the same
            _delete_uploads(client, uploaded)
        raise


def _delete_uploads(client: Client, file_ids: list[str]) -> None:
    for file_id in file_ids:
        try:
            client.delete(f"/files/{segment(file_id)}")
            typer.echo(f"deleted {output.clean(file_id)} again", err=True)
        except CliError as error:
            typer.echo(f"{output.clean(file_id)} is still on the server: {error}", err=True)


@app.command("list")
def list_jobs(limit: Annotated[int, typer.Option(min=1, help="How many at most, the newest first.")] = 20, as_json: AsJson = False) -> None:
    """List jobs."""
    found = list(Client.from_environment().pages(JOBS, limit))
    if as_json:
        output.print_json(found)
        return
    rows = ((j["id"], j["status"], progress_text(j), j["model"], j.get("fine_tuned_model"), output.local_time(j["created_at"])) for j in found)
    output.print_table(("id", "status", "progress", "model", "tuned model", "created"), rows)


def progress_text(job: Json) -> str | None:
    if job.get("queue_position") is not None:
        return f"place {job['queue_position']} in the queue"
    progress = job.get("progress") or {}
    started = progress.get("total_steps") and progress.get("step") is not None
    return f"step {progress['step']}/{progress['total_steps']}" if started else None


@app.command()
def get(job_id: JobId, as_json: AsJson = False) -> None:
    """Show one job's record."""
    found = Client.from_environment().get(f"{JOBS}/{segment(job_id)}")
    output.print_json(found) if as_json else output.print_fields(found)


@app.command()
def cancel(job_id: JobId) -> None:
    """Cancel a job; a running one stops at its next step."""
    job = Client.from_environment().post(f"{JOBS}/{segment(job_id)}/cancel")
    print("cancelled" if job["status"] == "cancelled" else f"cancellation requested; the job is {output.clean(job['status'])} and stops at its next step")


@app.command()
def pause(job_id: JobId) -> None:
    """Pause a job; a running one saves a checkpoint after the step that it is in, and gives its place to another."""
    job = Client.from_environment().post(f"{JOBS}/{segment(job_id)}/pause")
    print("paused" if job["status"] == "paused" else f"pause requested; the job is {output.clean(job['status'])} and stops at its next step")


@app.command()
def resume(job_id: JobId) -> None:
    """Let a paused job go on from its last checkpoint."""
    job = Client.from_environment().post(f"{JOBS}/{segment(job_id)}/resume")
    print(f"the job is {output.clean(job['status'])}")


@app.command()
def events(job_id: JobId, limit: Annotated[int, typer.Option(min=1, help="How many at most: the last ones.")] = 20, as_json: AsJson = False) -> None:
    """Show a job's last events, the oldest first."""
    found = list(Client.from_environment().pages(f"{JOBS}/{segment(job_id)}/events", limit))
    if as_json:
        output.print_json(found)
        return
    for event in reversed(found):
        print(f"{output.local_time(event['created_at'])}  {event['level']:5}  {output.clean(event['message'])}")


@app.command()
def watch(job_id: JobId) -> None:
    """Follow a job until it ends. Exit status 0 only where it succeeded."""
    raise typer.Exit(watch_job(Client.from_environment(), job_id))
