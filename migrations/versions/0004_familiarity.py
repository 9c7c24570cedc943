"""Harm by rehearsed faults: trusted examples to rehearse on, and how much of an example is known from trusted ones.

Scores that are there have no familiarity, and their directions go on without either.

Revision ID: 0004
"""

from pathlib import Path

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

SQL = Path(__file__).parents[1] / "sql"


def upgrade() -> None:
    familiarity = sa.Column(
        "familiarity",
        postgresql.ARRAY(sa.REAL()),
        server_default="{}",
        nullable=False,
        comment="mean size of the cosines with them",
    )
    op.add_column("scores", familiarity, schema="curator")
    _roles("'direction', 'reference', 'contrast', 'rehearsal'")
    _run((SQL / "0004_views.sql").read_text(encoding="utf-8"))


def downgrade() -> None:
    """A view cannot lose a column: it is made anew, and what stands on it."""
    op.execute("DROP VIEW curator.source_influence, curator.influence_scores")
    op.drop_column("scores", "familiarity", schema="curator")
    op.execute("UPDATE curator.validation_examples SET role = 'reference' WHERE role = 'rehearsal'")
    _roles("'direction', 'reference', 'contrast'")
    former = (SQL / "0001_views.sql").read_text(encoding="utf-8").split("\nCREATE VIEW curator.")
    for name in ("influence_scores", "source_influence"):
        _run("CREATE VIEW curator." + next(view for view in former if view.startswith(f"{name} ")))
        _run(f"""
            DO $$ BEGIN
                IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'curator_analyst') THEN
                    GRANT SELECT ON curator.{name} TO curator_analyst, curator_worker;
                END IF;
            END $$
        """)


def _roles(known: str) -> None:
    name = op.f("validation_examples_role_check")
    op.drop_constraint(name, "validation_examples", schema="curator", type_="check")
    op.create_check_constraint(name, "validation_examples", f"role IN ({known})", schema="curator")


def _run(sql: str) -> None:
    op.get_bind().connection.driver_connection.execute(sql)
