"""A checkpoint outlives its training state, which goes once it is superseded or its job has ended."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("checkpoints") as table:
        table.alter_column("storage_key", existing_type=sa.String(), nullable=True)


def downgrade() -> None:
    op.execute("delete from checkpoints where storage_key is null")
    with op.batch_alter_table("checkpoints") as table:
        table.alter_column("storage_key", existing_type=sa.String(), nullable=False)
