"""Scopes of keys, archived projects, an audit log that only grows, and what was created by which request."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

JSON_VALUE = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
OPERATORS_KEYS = ("first key", "instead of a lost key")
"""Names of the keys that a server makes for its operator and writes to admin.key."""


def upgrade() -> None:
    with op.batch_alter_table("projects") as projects:
        projects.add_column(sa.Column("archived_at", sa.Double(), nullable=True))
        projects.add_column(sa.Column("max_running_jobs", sa.Integer(), nullable=True))
        projects.create_check_constraint("max_running_jobs", "max_running_jobs >= 1")
    _add_scopes()
    _create_audit_events()
    op.create_table(
        "idempotency_records",
        sa.Column("fingerprint", sa.String(), nullable=False),
        sa.Column("request_sha256", sa.String(), nullable=False),
        sa.Column("object_id", sa.String(), nullable=False),
        sa.Column("by_retry", sa.Boolean(), nullable=False),
        sa.Column("answer", sa.String(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("fingerprint", name=op.f("pk_idempotency_records")),
    )
    op.create_index(op.f("ix_idempotency_records_object_id"), "idempotency_records", ["object_id"])
    op.create_index(op.f("ix_idempotency_records_expires_at"), "idempotency_records", ["expires_at"])


def downgrade() -> None:
    for table in ("idempotency_records", "audit_events"):
        op.drop_table(table)
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION refuse_to_change_audit_events")
    with op.batch_alter_table("api_keys") as keys:
        keys.drop_column("scopes")
    with op.batch_alter_table("projects") as projects:
        projects.drop_constraint(op.f("ck_projects_max_running_jobs"), type_="check")
        projects.drop_column("max_running_jobs")
        projects.drop_column("archived_at")


def _add_scopes() -> None:
    """Keys of before could do everything within their project; the operator's may manage the server from now on."""
    op.add_column("api_keys", sa.Column("scopes", JSON_VALUE, nullable=True))
    keys = sa.table("api_keys", sa.column("name", sa.String()), sa.column("scopes", JSON_VALUE))
    op.execute(keys.update().values(scopes=["read", "write", "infer"]))
    op.execute(keys.update().where(keys.c.name.in_(OPERATORS_KEYS)).values(scopes=["read", "write", "infer", "admin"]))
    with op.batch_alter_table("api_keys") as changed:
        changed.alter_column("scopes", existing_type=JSON_VALUE, nullable=False)


def _create_audit_events() -> None:
    op.create_table(
        "audit_events",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("object_id", sa.String(), nullable=False),
        sa.Column("actor_key_id", sa.String(), nullable=True),
        sa.Column("request_id", sa.String(), nullable=True),
        sa.Column("details", JSON_VALUE, nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_events")),
    )
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            "CREATE FUNCTION refuse_to_change_audit_events() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION 'audit_events only grows' USING ERRCODE = 'integrity_constraint_violation'; END $$"
        )
        for when in ("UPDATE", "DELETE", "TRUNCATE"):
            op.execute(
                f"CREATE TRIGGER audit_events_no_{when.lower()} BEFORE {when} ON audit_events"
                " FOR EACH STATEMENT EXECUTE FUNCTION refuse_to_change_audit_events()"
            )
    else:
        for when in ("UPDATE", "DELETE"):
            op.execute(f"CREATE TRIGGER audit_events_no_{when.lower()} BEFORE {when} ON audit_events BEGIN SELECT RAISE(ABORT, 'audit_events only grows'); END")
