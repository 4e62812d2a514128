"""How often what a tenant's sessions share on the engine was put out of reach."""

import sqlalchemy as sa
from alembic import op

revision = "0004_cache_epoch"
down_revision = "0003_ended_sessions"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("tenants", sa.Column("cache_epoch", sa.Integer))
