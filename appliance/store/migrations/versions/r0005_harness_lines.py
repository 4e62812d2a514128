"""Whether lines of a harness's own accounting are taken out of what a tenant's clients send."""

import sqlalchemy as sa
from alembic import op

revision = "0005_harness_lines"
down_revision = "0004_cache_epoch"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("tenants", sa.Column("harness_lines", sa.Text))
