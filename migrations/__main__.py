"""`python -m migrations` upgrades the database of the settings to the newest schema; `current` prints its revision."""

import sys

from alembic.util import CommandError

from core.settings import get_settings
from migrations.upgrade import current_revision, upgrade


def main(arguments: list[str]) -> int:
    database_url = get_settings().resolved_database_url
    if arguments == ["current"]:
        sys.stdout.write(f"{current_revision(database_url) or 'empty'}\n")
        return 0
    if arguments:
        sys.stderr.write("usage: python -m migrations [current]\n")
        return 2
    try:
        upgrade(database_url)
    except CommandError as error:
        sys.stderr.write(f"the database can't be migrated: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
