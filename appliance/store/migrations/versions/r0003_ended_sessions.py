"""When a client said that a session is over, and the sessions of a tree by its id."""

import sqlalchemy as sa
from alembic import op

revision = "0003_ended_sessions"
down_revision = "0002_digests"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("sessions", sa.Column("over_at", sa.Double))
    op.create_index("ix_sessions_tree_id", "sessions", ["tree_id"])
