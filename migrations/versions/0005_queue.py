"""When each project was last served, so that projects take turns."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("projects", sa.Column("last_claimed_at", sa.Double(), nullable=True))


def downgrade() -> None:
    op.drop_column("projects", "last_claimed_at")
