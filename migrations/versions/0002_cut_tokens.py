"""How much of an example the model did not see.

Revision ID: 0002
"""

from pathlib import Path

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

SQL = Path(__file__).parents[1] / "sql"


def upgrade() -> None:
    cut = sa.Column(
        "cut_tokens",
        sa.Integer(),
        server_default="0",
        nullable=False,
        comment="beyond the limit: not seen",
    )
    op.add_column("gradients", cut, schema="curator")
    op.get_bind().connection.driver_connection.execute((SQL / "0002_views.sql").read_text(encoding="utf-8"))


def downgrade() -> None:
    op.execute("DROP VIEW curator.cut_examples")
    op.drop_column("gradients", "cut_tokens", schema="curator")
