"""The revision that the code names is the migrations' newest, and another one is told from it and described."""

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import text

from core.database import Database
from core.schema_revision import HEAD, SchemaDoesNotFit, describe_misfit, fit_of, require_fitting_schema, schema_revision
from migrations.upgrade import configuration, upgrade


def set_revision(database: Database, revision: str) -> None:
    with database.transaction() as session:
        session.execute(text("update alembic_version set version_num = :revision"), {"revision": revision})


def test_head_is_the_newest_migration_and_revisions_grow() -> None:
    script = ScriptDirectory.from_config(configuration("sqlite://"))
    assert script.get_heads() == [HEAD]
    revisions = [revision.revision for revision in script.walk_revisions()]
    assert revisions == sorted(revisions, reverse=True), "older and newer are told by comparing them"
    assert {len(revision) for revision in revisions} == {4}


def test_a_migrated_database_fits(database: Database) -> None:
    with database.reading() as session:
        assert schema_revision(session) == HEAD
    require_fitting_schema(database)


@pytest.mark.parametrize(("revision", "fit"), [(None, "older"), ("0001", "older"), (HEAD, "fits"), ("9999", "newer")])
def test_older_and_newer(revision: str | None, fit: str) -> None:
    assert fit_of(revision) == fit


def test_an_empty_database_is_refused_with_the_command_that_mends_it(empty_database_url: str) -> None:
    database = Database(empty_database_url)
    try:
        with database.reading() as session:
            assert schema_revision(session) is None
        with pytest.raises(SchemaDoesNotFit, match=r"no tables yet.*run `python -m migrations`"):
            require_fitting_schema(database)
    finally:
        database.close()


def test_an_older_schema_is_refused_until_it_is_migrated(empty_database_url: str) -> None:
    upgrade(empty_database_url, "0001")
    database = Database(empty_database_url)
    try:
        with pytest.raises(SchemaDoesNotFit, match=rf"revision 0001.*needs {HEAD}: run `python -m migrations`"):
            require_fitting_schema(database)
        upgrade(empty_database_url)
        require_fitting_schema(database)
    finally:
        database.close()


def test_a_newer_schema_is_refused_with_what_to_start_instead(database: Database) -> None:
    set_revision(database, "9999")
    with pytest.raises(SchemaDoesNotFit, match=rf"revision 9999.*knows {HEAD}.*start that version"):
        require_fitting_schema(database)


def test_what_is_described_names_the_command() -> None:
    assert all("python -m migrations" in describe_misfit(revision) for revision in (None, "0001", "9999"))
