"""`python -m core.bootstrap`: the first project and its key on a migrated but empty database, and a new key where the key's file
is missing or names a key that the database does not know. Does nothing otherwise. `--first-only` where that file is not kept: a missing one says
nothing then."""

import argparse
import sys
from collections.abc import Sequence

from sqlalchemy import inspect

from core.database import Database
from core.projects import ensure_first_key, replace_lost_key
from core.settings import get_settings


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m core.bootstrap", description=__doc__)
    parser.add_argument("--first-only", action="store_true", help="make no new key where the key's file is missing")
    first_only = parser.parse_args(arguments).first_only
    settings = get_settings()
    path = settings.admin_key_path
    database = Database(settings.resolved_database_url)
    try:
        if not inspect(database.engine).has_table("projects"):
            sys.stderr.write("the database has no tables yet: run `python -m migrations` first\n")
            return 1
        if plain_key := ensure_first_key(database, path):
            sys.stderr.write(f"This server's first API key, shown once; it also stands in {path}:\n")
        elif not first_only and (plain_key := replace_lost_key(database, path)):
            sys.stderr.write(
                f"{path} was missing or unknown to the database, so a new API key was made and written there; it is shown once, and older keys stay valid:\n"
            )
    finally:
        database.close()
    if plain_key is not None:
        sys.stdout.write(plain_key + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
