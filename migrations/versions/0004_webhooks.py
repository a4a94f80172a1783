"""Events of a job are read in order: the index that pages and streams go by."""

from alembic import op

revision = "0004"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_job_events_job_id_sequence", "job_events", ["job_id", "sequence"])
    op.drop_index(op.f("ix_job_events_job_id"), "job_events")


def downgrade() -> None:
    op.create_index(op.f("ix_job_events_job_id"), "job_events", ["job_id"])
    op.drop_index("ix_job_events_job_id_sequence", "job_events")
