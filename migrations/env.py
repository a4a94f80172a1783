"""Alembic's entry point: runs what `migrations.upgrade` or the `alembic` command asked for, in one locked transaction."""

from alembic import context
from alembic.util import CommandError

from core.settings import get_settings
from core.tables.registry import metadata
from migrations.upgrade import migration_connection

if context.is_offline_mode():
    raise CommandError("migrations need a database: --sql is not supported")

with migration_connection(context.config.attributes.get("database_url") or get_settings().resolved_database_url) as connection:
    context.configure(connection=connection, target_metadata=metadata, render_as_batch=True, compare_type=True, compare_server_default=True)
    context.run_migrations()
