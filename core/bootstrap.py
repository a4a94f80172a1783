"""`python -m core.bootstrap`: the first project and its key, on a migrated but empty database. Does nothing otherwise."""

import sys

from sqlalchemy import inspect

from core.database import Database
from core.projects import ensure_first_key
from core.settings import get_settings


def main() -> int:
    settings = get_settings()
    database = Database(settings.resolved_database_url)
    try:
        if not inspect(database.engine).has_table("projects"):
            sys.stderr.write("the database has no tables yet: run `python -m migrations` first\n")
            return 1
        plain_key = ensure_first_key(database, settings.admin_key_path)
    finally:
        database.close()
    if plain_key is not None:
        sys.stderr.write(f"This server's first API key, shown once; it also stands in {settings.admin_key_path}:\n")
        sys.stdout.write(plain_key + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
