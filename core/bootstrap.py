"""`python -m core.bootstrap`: the first project and its key on a migrated but empty database, and a new key where the key's file
is missing or names a key that the database does not know. Does nothing otherwise.

The key is printed to a terminal only: what else reads the output is a log, which is kept, copied and searched."""

import argparse
import sys
from collections.abc import Sequence

from sqlalchemy import inspect
from sqlalchemy.exc import OperationalError

from core.database import Database, database_unusable
from core.projects import ensure_first_key, replace_lost_key
from core.settings import get_settings


def main(arguments: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m core.bootstrap", description=__doc__).parse_args(arguments)
    settings = get_settings()
    path = settings.admin_key_path
    database = Database(settings.resolved_database_url)
    try:
        if not inspect(database.engine).has_table("projects"):
            sys.stderr.write("the database has no tables yet: run `python -m migrations` first\n")
            return 1
        if plain_key := ensure_first_key(database, path):
            sys.stderr.write(f"This server's first API key stands in {path}\n")
        elif plain_key := replace_lost_key(database, path):
            sys.stderr.write(f"{path} was missing or unknown to the database, so a new API key was made and written there; older keys stay valid\n")
    except OperationalError as error:
        sys.stderr.write(f"{database_unusable(error)}\n")
        return 1
    finally:
        database.close()
    if plain_key is not None and sys.stdout.isatty():
        sys.stdout.write(plain_key + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
