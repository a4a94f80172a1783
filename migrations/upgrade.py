"""Brings a database's schema to the newest revision. Safe to run by several processes at once; does nothing when done."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from filelock import FileLock
from sqlalchemy import Connection, create_engine, event
from sqlalchemy.pool import NullPool

from core.database import parse_database_url

ADVISORY_LOCK = 5_134_862_607_712_001
"""Postgres: held by whoever migrates. Any number will do that nobody else uses."""


def upgrade(database_url: str, revision: str = "head") -> None:
    """Create or upgrade the schema. Raises alembic's CommandError where the database is newer than this program."""
    command.upgrade(configuration(database_url), revision)


def downgrade(database_url: str, revision: str) -> None:
    command.downgrade(configuration(database_url), revision)


def current_revision(database_url: str) -> str | None:
    """The schema's revision, or None before the first upgrade. Waits for a running migration."""
    with migration_connection(database_url) as connection:
        return MigrationContext.configure(connection).get_current_revision()


def configuration(database_url: str) -> Config:
    """Alembic's configuration without an ini file, so that it works wherever the package is installed."""
    config = Config(attributes={"database_url": database_url})
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


@contextmanager
def migration_connection(database_url: str) -> Iterator[Connection]:
    """A connection inside one transaction that nobody else who migrates can enter; commits at the end of the block."""
    url = parse_database_url(database_url)
    engine = create_engine(url, poolclass=NullPool)
    if url.get_backend_name() == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        with FileLock(f"{url.database}.migration.lock"), engine.begin() as connection:
            yield connection
    else:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})")
            yield connection


def _prepare_sqlite(connection: Any, record: Any) -> None:
    """Foreign keys stay unenforced here: changing a table on SQLite means copying and dropping it."""
    connection.isolation_level = None
    connection.execute("PRAGMA busy_timeout = 60000")
    connection.execute("PRAGMA journal_mode = WAL")


def _begin_sqlite(connection: Connection) -> None:
    """The driver by itself begins no transaction before DDL; with one, a failed migration leaves nothing behind."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")
