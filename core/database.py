"""Connections and transactions, the same code on SQLite and Postgres.

`transaction()` lives in services: it commits and closes, and only then does the service ring the doorbell and return.
Leases are compared with the database's clock alone (`database_now()`): machines' clocks differ. Times are unix seconds.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg.errors
from sqlalchemy import URL, Connection, Engine, Float, create_engine, event, make_url
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.sql.functions import FunctionElement

import core.tables.registry  # noqa: F401  (so that every foreign key finds its table, whichever tables a caller imports)
from core.errors import StorageFull, Unavailable
from core.logging import get_logger
from core.tables.base import Table

IDLE_IN_TRANSACTION_SECONDS = 10
"""After which Postgres ends a transaction that does nothing. A process that freezes inside one would else keep its row locks,
and nobody could take over the job it holds."""
POSTGRES_LINK = {"connect_timeout": 5, "tcp_user_timeout": 15_000, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
"""libpq's parameters: seconds, and milliseconds of `tcp_user_timeout`. A machine that vanishes breaks no connection off; without these a
thread that asks it would wait for a quarter of an hour."""
KEPT_CONNECTIONS = 20
"""That stay open when nobody uses them."""
LOCK_SECONDS = 5
"""That a statement waits for a lock on Postgres. Else whoever holds one for long, a program of the operator's say, would hold up every
thread of the API one by one, and its clients would hear nothing instead of a 503."""

SQLITE_BUSY_SECONDS = 10
"""That a transaction waits for SQLite's one write lock."""

DATABASE_REMEDY = "start it, make role and database (createuser, createdb), or correct SDFT_DATABASE_URL"

log = get_logger(__name__)


class database_now(FunctionElement[float]):
    """The database's clock in unix seconds, advancing within a transaction."""

    type = Float()
    inherit_cache = True


@compiles(database_now, "sqlite")
def _sqlite_now(element: database_now, compiler: Any, **options: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(database_now, "postgresql")
def _postgres_now(element: database_now, compiler: Any, **options: Any) -> str:
    return "extract(epoch from clock_timestamp())::double precision"


def parse_database_url(url: str) -> URL:
    """A SQLAlchemy URL with the driver that is installed here; makes the directory of a SQLite file."""
    parsed = make_url(url)
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() == "sqlite" and parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    return parsed


class Database:
    """One pool of up to `connections`. `url` is a SQLAlchemy URL of SQLite (a local file) or Postgres (psycopg)."""

    def __init__(self, url: str, *, connections: int = 40, pool_timeout_seconds: float = 5) -> None:
        parsed = parse_database_url(url)
        kept = min(connections, KEPT_CONNECTIONS)
        pool: dict[str, Any] = {"pool_size": kept, "max_overflow": connections - kept, "pool_timeout": pool_timeout_seconds}
        self.engine: Engine
        self._writers: threading.Lock | None = None
        if parsed.get_backend_name() == "sqlite":
            self._writers = threading.Lock()
            self.engine = create_engine(parsed, hide_parameters=True, **pool)
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        else:
            self.engine = create_engine(
                parsed,
                hide_parameters=True,  # else an error in a log line repeats the values that a user sent
                pool_pre_ping=True,
                connect_args=_connect_args(parsed),
                **pool,
            )
        self._write = sessionmaker(self.engine, expire_on_commit=False)
        self._read = sessionmaker(self.engine.execution_options(read_only=True), expire_on_commit=False)

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """A transaction that writes: commits at the end of the block, rolls back on an exception."""
        with _unavailable_when_exhausted(), self._in_turn(), self._write() as session, session.begin():
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A transaction that only reads: never takes SQLite's write lock."""
        with _unavailable_when_exhausted(), self._read() as session, session.begin():
            yield session

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        """SQLite has one writer at a time. Whoever waits there only looks again and again, ever more rarely, and others come first, so
        this process's writers wait for each other here; SQLite's own waiting is left to those of different processes."""
        if self._writers is None:
            yield
            return
        if not self._writers.acquire(timeout=SQLITE_BUSY_SECONDS):
            raise Unavailable("the database is busy")
        try:
            yield
        finally:
            self._writers.release()


def _connect_args(url: URL) -> dict[str, Any]:
    """What the URL itself says of the link holds."""
    options = f"-c idle_in_transaction_session_timeout={IDLE_IN_TRANSACTION_SECONDS * 1000} -c lock_timeout={LOCK_SECONDS * 1000}"
    return {**{name: value for name, value in POSTGRES_LINK.items() if name not in url.query}, "options": options}


@contextmanager
def _unavailable_when_exhausted() -> Iterator[None]:
    """A full pool, a lost connection or a database that stays locked is a 503 that clients retry. The log has the database's words."""
    try:
        yield
    except PoolTimeout as error:
        log.warning("database_connections_exhausted")
        raise Unavailable("the server is busy: no database connection became free in time") from error
    except (OperationalError, InternalError) as error:
        if _is_own_mistake(error):
            raise
        log.warning("database_failed", error=str(error.orig).partition("\n")[0][:500])
        if getattr(error.orig, "sqlite_errorname", None) == "SQLITE_FULL" or isinstance(error.orig, psycopg.errors.DiskFull):
            raise StorageFull("the database's disk is full; nothing was stored") from error
        raise Unavailable("the database can't be reached or is busy") from error


def database_unusable(error: OperationalError) -> str:
    """For people who started a command: the database's own words, and what to do. Raises `error` where a statement of ours was wrong."""
    if _is_own_mistake(error):
        raise error
    said = " ".join(str(error.orig).split())[:500]
    return f"the database can't be used: {said}; {DATABASE_REMEDY}"


def _is_own_mistake(error: OperationalError | InternalError) -> bool:
    """A wrong statement or a missing table, which no retry will mend. psycopg tells those apart by class already, and only two of its
    internal errors are the server's condition: an idle transaction that it ended, and a standby that became no primary."""
    if isinstance(error, InternalError):
        return not isinstance(error.orig, psycopg.errors.IdleInTransactionSessionTimeout | psycopg.errors.ReadOnlySqlTransaction)
    return getattr(error.orig, "sqlite_errorname", None) == "SQLITE_ERROR"


def _prepare_sqlite(connection: DBAPIConnection, record: Any) -> None:
    connection.isolation_level = None  # transactions begin where _begin_sqlite says
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {SQLITE_BUSY_SECONDS * 1000}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    """A write transaction takes the lock at its start: upgrading a read lock later fails at once instead of waiting."""
    read_only = connection.get_execution_options().get("read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def insert_for(session: Session, table: type[Table]) -> postgresql.Insert | sqlite.Insert:
    """An INSERT of the session's own database, which can go on with `on_conflict_…`."""
    return postgresql.insert(table) if session.get_bind().dialect.name == "postgresql" else sqlite.insert(table)


def unix_now() -> float:
    """This machine's clock, for `created_at` columns. Never for leases."""
    return time.time()
