"""Whether a tenant's turns carry keyed digests of their texts in the audit log."""

import sqlalchemy as sa
from alembic import op

revision = "0002_digests"
down_revision = "0001_bound"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("tenants", sa.Column("audit_digests", sa.Text))
