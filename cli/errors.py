"""What goes wrong at the command line: one line on standard error, exit status 1, no traceback.

CliError
├── ServerRefused      the server answered with an error; the message is the server's
└── ServerUnreachable  no answer
"""

from typing import Any

import typer
from typer.core import TyperGroup


class CliError(Exception):
    pass


class ServerRefused(CliError):
    def __init__(self, message: str, status: int, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class ServerUnreachable(CliError):
    pass


class OneLineErrors(TyperGroup):
    """The command group at the top: where errors end."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CliError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        except BrokenPipeError:  # nobody reads our output any more (`| head`): click ends quietly
            raise
        except OSError as error:  # a file that can't be read or written; its text names it
            typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1)
