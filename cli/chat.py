"""`sdft chat`: one answer, or a conversation, streamed."""

import sys
from typing import Annotated, Any

import typer

from cli.client import Client, Json
from cli.errors import CliError
from cli.output import clean


def chat(
    model: Annotated[str, typer.Argument(help="A base model's or a tuned model's id.")],
    prompt: Annotated[str | None, typer.Argument(help="One question ('-': read it from standard input). Without it: a conversation.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0: the likeliest answer.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
) -> None:
    """Chat with a model. In a conversation, Ctrl-D ends it and Ctrl-C stops an answer."""
    client = Client.from_environment()
    options: Json = {"model": model}
    options |= {"temperature": temperature} if temperature is not None else {}
    options |= {"max_tokens": max_tokens} if max_tokens is not None else {}
    messages: list[Json] = [{"role": "system", "content": system}] if system is not None else []
    if prompt is not None:
        question = sys.stdin.read() if prompt == "-" else prompt
        _answer(client, options, [*messages, {"role": "user", "content": question}])
    else:
        _converse(client, options, messages)


def _converse(client: Client, options: Json, messages: list[Json]) -> None:
    interactive = sys.stdin.isatty()
    while True:
        try:
            question = input("you: " if interactive else "")
        except EOFError:
            return
        if not question.strip():
            continue
        asked = [*messages, {"role": "user", "content": question}]
        try:
            answer = _answer(client, options, asked)
        except KeyboardInterrupt:
            print("\n(stopped)")
            continue
        except CliError as error:
            if not interactive:
                raise
            typer.echo(f"error: {error}", err=True)  # the conversation goes on
            continue
        messages = [*asked, {"role": "assistant", "content": answer}]


def _answer(client: Client, options: Json, messages: list[Json]) -> str:
    """Print the answer as it comes. Returns it."""
    pieces: list[str] = []
    try:
        for event in client.stream_events("/chat/completions", {**options, "messages": messages, "stream": True}):
            pieces.append(_text_of(event))
            print(clean(pieces[-1]), end="", flush=True)
    finally:
        if pieces:
            print()
    return "".join(pieces)


def _text_of(event: dict[str, Any]) -> str:
    choices = event.get("choices") or [{}]
    return str((choices[0].get("delta") or {}).get("content") or "")
