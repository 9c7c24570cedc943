"""Verifications: proof by training.

Revision ID: 0003
Revises: 0002
"""

from pathlib import Path

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

SQL = Path(__file__).parents[1] / "sql" / "0003_views.sql"
TABLES = ("results", "runs", "trials", "records")


def upgrade() -> None:
    _verifications()
    _records()
    _trials()
    _runs()
    _results()
    _say("inbox row or intake, direction set, example, batch or run: by the stage")
    op.get_bind().connection.driver_connection.execute(SQL.read_text(encoding="utf-8"))


def _verifications() -> None:
    op.create_table(
        "verifications",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("recipe_id", sa.BigInteger(), nullable=False),
        sa.Column("direction_set_id", sa.BigInteger(), nullable=False),
        sa.Column("selection", sa.Text(), comment="whose choice is verified too; NULL: none"),
        sa.Column("held_out", sa.Text(), comment="the file of held-out examples; NULL: the references"),
        sa.Column("seeds", sa.Integer(), nullable=False),
        sa.Column("draws", sa.Integer(), nullable=False, comment="of each random arm, for each seed"),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("epochs", sa.Integer(), comment="NULL, as below: what the workload says"),
        sa.Column("batch", sa.Integer()),
        sa.Column("learning_rate", sa.Double()),
        sa.Column("pool", sa.ARRAY(sa.BigInteger()), nullable=False, comment="the examples there were to train on"),
        sa.Column("state", sa.Text(), server_default="running", nullable=False),
        sa.Column("detail", sa.Text(), comment="what it failed of"),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        sa.CheckConstraint(
            "state IN ('running', 'done', 'failed', 'cancelled')", name=op.f("verifications_state_check")
        ),
        sa.ForeignKeyConstraint(
            ["direction_set_id"], ["curator.direction_sets.id"], name=op.f("verifications_direction_set_id_fkey")
        ),
        sa.ForeignKeyConstraint(["recipe_id"], ["curator.recipes.id"], name=op.f("verifications_recipe_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("verifications_pkey")),
        schema="curator",
        comment="Proof by training. What each run is trained on and measured with is decided when it is asked for.",
    )


def _records() -> None:
    op.create_table(
        "verification_records",
        sa.Column("verification_id", sa.BigInteger(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("record", postgresql.JSON(astext_type=sa.Text()), nullable=False),
        _of_verification("verification_records"),
        sa.PrimaryKeyConstraint("verification_id", "position", name=op.f("verification_records_pkey")),
        schema="curator",
        comment="Held-out examples that came from a file.",
    )


def _trials() -> None:
    op.create_table(
        "verification_trials",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("verification_id", sa.BigInteger(), nullable=False),
        sa.Column("arm", sa.Text(), nullable=False),
        sa.Column("draw", sa.Integer(), nullable=False, comment="of a random arm, from 1; 0: it is no random one"),
        sa.Column("picked", sa.ARRAY(sa.BigInteger()), comment="these of the pool; NULL: all of it"),
        sa.Column("left_out", sa.ARRAY(sa.BigInteger()), comment="less these"),
        sa.Column("examples", sa.Integer(), nullable=False),
        _of_verification("verification_trials"),
        sa.PrimaryKeyConstraint("id", name=op.f("verification_trials_pkey")),
        schema="curator",
    )
    op.create_index(
        op.f("verification_trials_verification_id_idx"), "verification_trials", ["verification_id"], schema="curator"
    )


def _runs() -> None:
    op.create_table(
        "verification_runs",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("trial_id", sa.BigInteger(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column(
            "validation_loss",
            sa.ARRAY(sa.REAL()),
            comment="of each example behind the directions, in their order",
        ),
        sa.Column("validation_correct", sa.ARRAY(sa.REAL())),
        sa.Column("held_out_loss", sa.ARRAY(sa.REAL())),
        sa.Column("held_out_correct", sa.ARRAY(sa.REAL())),
        sa.Column("training", sa.Text(), comment="how it was trained"),
        sa.Column("seconds", sa.REAL()),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        sa.ForeignKeyConstraint(
            ["trial_id"], ["curator.verification_trials.id"], name=op.f("verification_runs_trial_id_fkey")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("verification_runs_pkey")),
        sa.UniqueConstraint("trial_id", "seed", name=op.f("verification_runs_trial_id_seed_key")),
        schema="curator",
    )


def _results() -> None:
    op.create_table(
        "verification_results",
        sa.Column("verification_id", sa.BigInteger(), nullable=False),
        sa.Column("arm", sa.Text(), nullable=False),
        sa.Column("beside", sa.Text(), nullable=False, comment="the arm it is compared with"),
        sa.Column("part", sa.Text(), nullable=False),
        sa.Column("slice", sa.Text(), nullable=False, comment="set/slice; empty: all of them together"),
        sa.Column("measure", sa.Text(), nullable=False),
        sa.Column("mean", sa.Double(), nullable=False, comment="of the arm itself"),
        sa.Column("effect", sa.Double(), nullable=False, comment="how much better than the other; positive helps"),
        sa.Column("ci_low", sa.Double(), nullable=False),
        sa.Column("ci_high", sa.Double(), nullable=False),
        sa.CheckConstraint("measure IN ('loss', 'accuracy')", name=op.f("verification_results_measure_check")),
        sa.CheckConstraint("part IN ('validation', 'held-out')", name=op.f("verification_results_part_check")),
        _of_verification("verification_results"),
        sa.PrimaryKeyConstraint(
            *("verification_id", "arm", "beside", "part", "slice", "measure"), name=op.f("verification_results_pkey")
        ),
        schema="curator",
    )


def _of_verification(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["verification_id"], ["curator.verifications.id"], name=op.f(f"{table}_verification_id_fkey")
    )


def _say(words: str) -> None:
    op.alter_column("work", "subject", existing_type=sa.BigInteger(), comment=words, schema="curator")


def downgrade() -> None:
    """Verifications go, finished or not."""
    op.execute("DELETE FROM curator.work WHERE stage = 'verifications'")
    op.execute("DROP VIEW curator.verification_arms")
    for part in TABLES:
        op.drop_table(f"verification_{part}", schema="curator")
    op.drop_table("verifications", schema="curator")
    _say("inbox row or intake, direction set, example or batch: by the stage")
