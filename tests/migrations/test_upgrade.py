"""The schema comes from migrations alone, on both databases, however many processes bring it up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from alembic import command
from alembic.util import CommandError
from sqlalchemy import CheckConstraint, inspect, select, text
from sqlalchemy.exc import DatabaseError, IntegrityError

from core.database import DATABASE_REMEDY, Database
from core.tables.jobs import JOB_STATUSES
from core.tables.models import MODEL_STATUSES, Model
from core.tables.projects import SCOPES, ApiKey
from core.tables.registry import metadata
from migrations.upgrade import configuration, current_revision, downgrade, upgrade

HEAD = "0008"


def tables_of(url: str) -> set[str]:
    database = Database(url)
    try:
        return set(inspect(database.engine).get_table_names()) - {"alembic_version"}
    finally:
        database.close()


def run_migrations(url: str, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
    command_line = [sys.executable, "-m", "migrations", *arguments]
    environment = os.environ | {"SDFT_DATABASE_URL": url}
    return subprocess.Popen(command_line, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_upgrade_creates_every_table_and_repeats_without_effect(empty_database_url: str) -> None:
    assert current_revision(empty_database_url) is None
    upgrade(empty_database_url)
    assert tables_of(empty_database_url) == set(metadata.tables)
    upgrade(empty_database_url)
    assert current_revision(empty_database_url) == HEAD


def test_migrations_give_exactly_the_schema_of_the_tables(database_url: str) -> None:
    command.check(configuration(database_url))  # raises where autogenerate would write anything


def test_migrations_give_the_check_constraints_of_the_tables(database: Database) -> None:
    """`alembic check` doesn't compare these."""
    inspector = inspect(database.engine)
    for table in metadata.tables.values():
        declared = {str(constraint.name) for constraint in table.constraints if isinstance(constraint, CheckConstraint)}
        assert {constraint["name"] for constraint in inspector.get_check_constraints(table.name)} == declared


def add_job_row(database: Database) -> None:
    with database.transaction() as session:
        session.execute(text("insert into projects (id, name, created_at) values ('proj-1', 'p', 0)"))
        session.execute(
            text(
                "insert into fine_tuning_jobs (id, project_id, status, model, base_model, training_file_id, method, seed, created_at, attempt, lost_leases)"
                " values ('ftjob-1', 'proj-1', 'queued', 'm', 'm', 'file-1', '{}', 0, 0, 0, 0)"
            )
        )


def test_every_status_can_be_stored(database: Database) -> None:
    add_job_row(database)
    model = Model(
        id="ft:m", project_id="proj-1", job_id="ftjob-1", base_model="m", status="servable", serving_name="s", storage_key="k", archive_bytes=3 * 2**31
    )
    model.archive_sha256, model.created_at = "0", 0.0
    with database.transaction() as session:
        session.add(model)
    for table, statuses in (("fine_tuning_jobs", JOB_STATUSES), ("models", MODEL_STATUSES)):
        for status in statuses:
            with database.transaction() as session:
                session.execute(text(f"update {table} set status = '{status}'"))


@pytest.mark.parametrize(
    ("column", "value"), [("status", "'sleeping'"), ("lease_token", "'half a lease'"), ("parent_model", "'ft:nobody'"), ("project_id", "'proj-nobody'")]
)
def test_database_itself_refuses_impossible_jobs(database: Database, column: str, value: str) -> None:
    add_job_row(database)
    with pytest.raises(IntegrityError), database.transaction() as session:
        session.execute(text(f"update fine_tuning_jobs set {column} = {value}"))


def test_downgrade_and_upgrade_again(database_url: str) -> None:
    downgrade(database_url, "base")
    assert tables_of(database_url) == set()
    upgrade(database_url)
    command.check(configuration(database_url))


def test_keys_of_before_scopes_can_do_what_they_could(empty_database_url: str) -> None:
    upgrade(empty_database_url, "0002")
    database = Database(empty_database_url)
    try:
        add_job_row(database)
        with database.transaction() as session:
            for key_id, name in (("a", "first key"), ("b", "instead of a lost key"), ("c", "laptop")):
                values = f"('{key_id}', 'proj-1', '{name}', '0', 0)"
                session.execute(text(f"insert into api_keys (id, project_id, name, key_sha256, created_at) values {values}"))
        upgrade(empty_database_url)
        with database.reading() as session:
            keys = list(session.scalars(select(ApiKey).order_by(ApiKey.id)))
            assert session.scalar(text("select count(*) from fine_tuning_jobs where project_id = 'proj-1'")) == 1
        assert [key.scopes for key in keys] == [list(SCOPES), list(SCOPES), ["read", "write", "infer"]]
        assert [(key.project_id, key.name, key.expires_at) for key in keys][2] == ("proj-1", "laptop", None)
    finally:
        database.close()


def test_failed_migration_leaves_nothing_behind(empty_database_url: str) -> None:
    database = Database(empty_database_url)
    with database.transaction() as session:
        session.execute(text("create table models (id text)"))
    database.close()
    with pytest.raises(DatabaseError):
        upgrade(empty_database_url)
    assert tables_of(empty_database_url) == {"models"}
    assert current_revision(empty_database_url) is None


@pytest.mark.slow
def test_several_processes_may_migrate_at_once_from_any_directory(empty_database_url: str, tmp_path: Path) -> None:
    processes = [run_migrations(empty_database_url, cwd=tmp_path) for _ in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    output, _ = run_migrations(empty_database_url, "current", cwd=tmp_path).communicate(timeout=60)
    assert output == f"{HEAD}\n"


def test_database_of_a_newer_program_is_refused(database_url: str, tmp_path: Path) -> None:
    database = Database(database_url)
    with database.transaction() as session:
        session.execute(text("update alembic_version set version_num = '9999'"))
    database.close()
    with pytest.raises(CommandError, match="9999"):
        upgrade(database_url)
    process = run_migrations(database_url, cwd=tmp_path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "can't be migrated" in errors
    assert "start that version, or restore the backup" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("module", ["migrations", "core.bootstrap"])
def test_a_database_that_is_away_is_named_with_what_mends_it(module: str, tmp_path: Path) -> None:
    variables = {"SDFT_DATABASE_URL": "postgresql://sdft:hidden@127.0.0.1:1/sdft", "SDFT_DATA_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-m", module], env=os.environ | variables, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert line.startswith("the database can't be used: ")
    assert line.endswith(DATABASE_REMEDY)
    assert "hidden" not in line


def test_unknown_argument_is_refused(sqlite_url: str, tmp_path: Path) -> None:
    process = run_migrations(sqlite_url, "downgrade", cwd=tmp_path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "usage" in errors


def test_path_with_a_percent_sign(tmp_path: Path) -> None:
    path = tmp_path / "50%s data" / "database.sqlite3"
    upgrade(f"sqlite:///{path}")
    assert path.exists()
