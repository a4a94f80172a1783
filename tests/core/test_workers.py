"""Which workers there are, on both databases."""

from sqlalchemy import select, update

from core.database import Database, database_now
from core.tables.workers import Worker
from core.workers import FORGOTTEN_SECONDS, GONE_SECONDS, leave, tell_presence, workers_that_are_there


def there(database: Database) -> list[tuple[str, int]]:
    with database.reading() as session:
        return [(worker.id, worker.slots) for worker in workers_that_are_there(session)]


def tell(database: Database, worker_id: str, devices: list[list[str]]) -> None:
    with database.transaction() as session:
        tell_presence(session, worker_id, "host", devices)


def age(database: Database, worker_id: str, seconds: float) -> None:
    with database.transaction() as session:
        session.execute(update(Worker).where(Worker.id == worker_id).values(seen_at=database_now() - seconds))


def test_a_worker_is_there_while_it_says_so(database: Database) -> None:
    tell(database, "one", [["GPU-0"], ["GPU-1"]])
    tell(database, "two", [[]])
    assert there(database) == [("one", 2), ("two", 1)]
    age(database, "one", GONE_SECONDS + 1)
    assert there(database) == [("two", 1)]
    tell(database, "one", [["GPU-0"]])
    assert there(database) == [("one", 1), ("two", 1)]
    with database.transaction() as session:
        leave(session, "two")
    assert there(database) == [("one", 1)]


def test_workers_that_went_long_ago_are_forgotten(database: Database) -> None:
    tell(database, "old", [[]])
    age(database, "old", FORGOTTEN_SECONDS + 1)
    tell(database, "new", [[]])
    with database.reading() as session:
        assert list(session.scalars(select(Worker.id))) == ["new"]
