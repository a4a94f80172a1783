"""Whether the database's schema is the one that this program was written for. Migrations bring it there; nobody else changes it.

A program meets an older schema when `python -m migrations` was forgotten, and a newer one while a deploy is under way. With an older
one none of its statements may work. With a newer one those of a running program mostly do, so it finishes what it has begun.
"""

from typing import Literal

from sqlalchemy import inspect, text
from sqlalchemy.orm import Session

from core.database import Database

HEAD = "0008"
"""The newest revision in migrations/versions. Revisions are numbers of four digits, each greater than the one before."""

Fit = Literal["fits", "older", "newer"]


class SchemaDoesNotFit(Exception):
    """Said at the start, for whoever starts the program."""


def schema_revision(session: Session) -> str | None:
    """The schema's revision; None before the first migration."""
    if not inspect(session.connection()).has_table("alembic_version"):
        return None
    revision: str | None = session.scalar(text("select version_num from alembic_version"))
    return revision


def fit_of(revision: str | None) -> Fit:
    if revision == HEAD:
        return "fits"
    return "older" if revision is None or revision < HEAD else "newer"


def describe_misfit(revision: str | None) -> str:
    """What is wrong with a schema that doesn't fit, and what mends it."""
    if revision is None:
        return f"the database has no tables yet, and this program needs schema revision {HEAD}: run `python -m migrations`"
    if fit_of(revision) == "older":
        return f"the database's schema has revision {revision}, and this program needs {HEAD}: run `python -m migrations`"
    return (
        f"the database's schema has revision {revision}, and this program knows {HEAD}: a newer version has run `python -m migrations`; "
        "start that version, or restore the backup from before it"
    )


def require_fitting_schema(database: Database) -> None:
    """Raises SchemaDoesNotFit, or Unavailable where the database can't be asked."""
    with database.reading() as session:
        revision = schema_revision(session)
    if fit_of(revision) != "fits":
        raise SchemaDoesNotFit(describe_misfit(revision))
