"""`python -m migrations` upgrades the database of the settings to the newest schema; `current` prints its revision."""

import sys

from alembic.util import CommandError
from sqlalchemy.exc import OperationalError

from core.database import database_unusable
from core.schema_revision import describe_misfit, fit_of
from core.settings import get_settings
from migrations.upgrade import current_revision, upgrade


def main(arguments: list[str]) -> int:
    database_url = get_settings().resolved_database_url
    if arguments not in ([], ["current"]):
        sys.stderr.write("usage: python -m migrations [current]\n")
        return 2
    try:
        revision = current_revision(database_url)
        if arguments:
            sys.stdout.write(f"{revision or 'empty'}\n")
        elif fit_of(revision) == "newer":
            sys.stderr.write(f"the database can't be migrated: {describe_misfit(revision)}\n")
            return 1
        else:
            upgrade(database_url)
    except CommandError as error:
        sys.stderr.write(f"the database can't be migrated: {error}\n")
        return 1
    except OperationalError as error:
        sys.stderr.write(f"{database_unusable(error)}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
