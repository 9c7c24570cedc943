"""The first tables, functions, roles and views.

Revision ID: 0001
"""

from pathlib import Path

import sqlalchemy as sa
from alembic import op
from pgvector.sqlalchemy import HALFVEC
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

SQL = Path(__file__).parents[1] / "sql"


def upgrade() -> None:
    op.create_table(
        "checkpoints",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("in_use", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("added_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("checkpoints_pkey")),
        sa.UniqueConstraint("name", name=op.f("checkpoints_name_key")),
        schema="curator",
    )
    op.create_index(
        "checkpoints_one_in_use",
        "checkpoints",
        ["in_use"],
        unique=True,
        schema="curator",
        postgresql_where=sa.text("in_use"),
    )
    op.create_table(
        "folders",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), server_default="", nullable=False, comment="empty: the name of each file"),
        sa.Column("added_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("folders_pkey")),
        sa.UniqueConstraint("path", name=op.f("folders_path_key")),
        schema="curator",
    )
    op.create_table(
        "gradient_blocks",
        sa.Column("recipe_id", sa.BigInteger(), nullable=False),
        sa.Column("block", sa.SmallInteger(), nullable=False),
        sa.Column("example_id", sa.BigInteger(), nullable=False),
        sa.Column("vector", HALFVEC(), nullable=False, comment="a block of the whitened unit vector"),
        sa.PrimaryKeyConstraint("recipe_id", "block", "example_id", name=op.f("gradient_blocks_pkey")),
        schema="curator",
        postgresql_partition_by="LIST (recipe_id)",
    )
    op.create_table(
        "inbox",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("record", postgresql.JSON(astext_type=sa.Text()), nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("inbox_pkey")),
        schema="curator",
        comment="INSERT INTO curator.inbox (source, record): plain SQL is a way in. A row leaves when it is taken.",
    )
    op.create_table(
        "jobs",
        sa.Column("job", sa.Text(), nullable=False),
        sa.Column("window", sa.BigInteger(), nullable=False, comment="the schedule's period, counted from the epoch"),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("others", sa.Integer(), server_default="0", nullable=False, comment="who came second"),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("job", "window", name=op.f("jobs_pkey")),
        schema="curator",
    )
    op.create_table(
        "sources",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("added_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("sources_pkey")),
        sa.UniqueConstraint("name", name=op.f("sources_name_key")),
        schema="curator",
    )
    op.create_table(
        "validation_sets",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("slice_field", sa.Text(), server_default="", nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("in_use", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("added_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("validation_sets_pkey")),
        sa.UniqueConstraint("name", "version", name=op.f("validation_sets_name_version_key")),
        schema="curator",
    )
    op.create_index(
        "validation_sets_one_in_use",
        "validation_sets",
        ["name"],
        unique=True,
        schema="curator",
        postgresql_where=sa.text("in_use"),
    )
    op.create_table(
        "work",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("stage", sa.Text(), nullable=False),
        sa.Column("recipe_id", sa.BigInteger(), server_default="0", nullable=False, comment="0: before any recipe"),
        sa.Column(
            "subject",
            sa.BigInteger(),
            nullable=False,
            comment="inbox row or intake, direction set, example or batch: by the stage",
        ),
        sa.Column("kind", sa.Text(), server_default="", nullable=False, comment="examples: inbox or file"),
        sa.Column("batch_id", sa.BigInteger(), nullable=True),
        sa.Column("state", sa.Text(), server_default="ready", nullable=False),
        sa.Column("priority", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("attempts", sa.SmallInteger(), server_default="0", nullable=False, comment="workers that died on it"),
        sa.Column("owner", sa.Text(), nullable=True),
        sa.Column("leased_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("not_before", sa.DateTime(timezone=True), server_default=sa.text("to_timestamp(0)"), nullable=False),
        sa.Column("offered_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.CheckConstraint("state IN ('ready', 'leased', 'done', 'quarantined')", name=op.f("work_state_check")),
        sa.PrimaryKeyConstraint("id", name=op.f("work_pkey")),
        sa.UniqueConstraint(
            "stage", "kind", "recipe_id", "subject", name=op.f("work_stage_kind_recipe_id_subject_key")
        ),
        schema="curator",
        comment="The ledger. The database decides what is left; a Celery message only says there is some.",
    )
    op.create_index(
        "work_claimable",
        "work",
        ["stage", "kind", "priority", "attempts", sa.text("recipe_id DESC"), "id"],
        unique=False,
        schema="curator",
        postgresql_where=sa.text("state = 'ready'"),
    )
    op.create_index(
        "work_leased",
        "work",
        ["lease_until"],
        unique=False,
        schema="curator",
        postgresql_where=sa.text("state = 'leased'"),
    )
    op.create_index(
        "work_open_of_batch",
        "work",
        ["batch_id", "recipe_id"],
        unique=False,
        schema="curator",
        postgresql_where=sa.text("state IN ('ready', 'leased')"),
    )
    op.create_index(
        "work_oldest",
        "work",
        ["stage", "state", "offered_at"],
        unique=False,
        schema="curator",
        postgresql_where=sa.text("state IN ('ready', 'leased')"),
    )
    op.create_index(
        "work_troubled",
        "work",
        ["id"],
        unique=False,
        schema="curator",
        postgresql_where=sa.text("last_error IS NOT NULL AND state IN ('ready', 'quarantined')"),
    )
    op.create_table(
        "work_tallies",
        sa.Column("stage", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("n", sa.BigInteger(), nullable=False),
        schema="curator",
        comment="Differences noted by triggers on work; their sum is how much there is of a stage and state.",
    )
    op.create_table(
        "intakes",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("source_id", sa.BigInteger(), nullable=False),
        sa.Column("origin", sa.Text(), nullable=False, comment="a file's path, inbox or stdin"),
        sa.Column("digest", sa.LargeBinary(), nullable=False, comment="SHA-256 of the file"),
        sa.Column("state", sa.Text(), server_default="reading", nullable=False),
        sa.Column("position", sa.BigInteger(), server_default="0", nullable=False, comment="the last line that is in"),
        sa.Column("accepted", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("duplicates", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("refused", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("repaired", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("detail", sa.Text(), nullable=True),
        sa.Column("opened_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("closed_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("state IN ('reading', 'complete', 'damaged')", name=op.f("intakes_state_check")),
        sa.ForeignKeyConstraint(["source_id"], ["curator.sources.id"], name=op.f("intakes_source_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("intakes_pkey")),
        sa.UniqueConstraint("source_id", "origin", "digest", name=op.f("intakes_source_id_origin_digest_key")),
        schema="curator",
    )
    op.create_table(
        "recipes",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column(
            "key", sa.LargeBinary(), nullable=False, comment="digest of everything that makes gradients comparable"
        ),
        sa.Column("checkpoint_id", sa.BigInteger(), nullable=False),
        sa.Column(
            "spec",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="what was asked for; nothing filters on it",
        ),
        sa.Column(
            "fitted_on",
            sa.ARRAY(sa.BigInteger()),
            nullable=True,
            comment="the validation sets whose directions' examples it was fitted on",
        ),
        sa.Column("dimension", sa.Integer(), nullable=True),
        sa.Column(
            "temperature",
            sa.REAL(),
            nullable=True,
            comment="of the checkpoint, on trusted data; 1 is calibrated, above is overconfident",
        ),
        sa.Column("state", sa.Text(), server_default="fitting", nullable=False),
        sa.Column("in_use", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("added_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("state IN ('fitting', 'ready')", name=op.f("recipes_state_check")),
        sa.ForeignKeyConstraint(["checkpoint_id"], ["curator.checkpoints.id"], name=op.f("recipes_checkpoint_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("recipes_pkey")),
        sa.UniqueConstraint("key", name=op.f("recipes_key_key")),
        schema="curator",
    )
    op.create_index(
        "recipes_one_in_use", "recipes", ["in_use"], unique=True, schema="curator", postgresql_where=sa.text("in_use")
    )
    op.create_table(
        "validation_examples",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("validation_set_id", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("external_id", sa.Text(), server_default="", nullable=False),
        sa.Column("record", postgresql.JSON(astext_type=sa.Text()), nullable=False),
        sa.Column("slice", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.CheckConstraint(
            "role IN ('direction', 'reference', 'contrast')", name=op.f("validation_examples_role_check")
        ),
        sa.ForeignKeyConstraint(
            ["validation_set_id"],
            ["curator.validation_sets.id"],
            name=op.f("validation_examples_validation_set_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("validation_examples_pkey")),
        sa.UniqueConstraint(
            "validation_set_id", "digest", name=op.f("validation_examples_validation_set_id_digest_key")
        ),
        schema="curator",
    )
    op.create_table(
        "batches",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("intake_id", sa.BigInteger(), nullable=False),
        sa.Column("ordinal", sa.Integer(), nullable=False),
        sa.Column("examples", sa.Integer(), server_default="0", nullable=False),
        sa.Column("closed", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("opened_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["intake_id"], ["curator.intakes.id"], name=op.f("batches_intake_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("batches_pkey")),
        sa.UniqueConstraint("intake_id", "ordinal", name=op.f("batches_intake_id_ordinal_key")),
        schema="curator",
        comment="Examples of one intake that are judged together: the family of the false discovery rate.",
    )
    op.create_index(
        "batches_one_open",
        "batches",
        ["intake_id"],
        unique=True,
        schema="curator",
        postgresql_where=sa.text("NOT closed"),
    )
    op.create_table(
        "curvatures",
        sa.Column("recipe_id", sa.BigInteger(), nullable=False),
        sa.Column("part", sa.Text(), nullable=False),
        sa.Column("tensor", sa.LargeBinary(), nullable=False, comment="one tensor as safetensors"),
        sa.ForeignKeyConstraint(["recipe_id"], ["curator.recipes.id"], name=op.f("curvatures_recipe_id_fkey")),
        sa.PrimaryKeyConstraint("recipe_id", "part", name=op.f("curvatures_pkey")),
        schema="curator",
        comment="What is frozen with a recipe: Fisher eigenbases of the kept entries, Kronecker factors.",
    )
    op.create_table(
        "direction_sets",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("recipe_id", sa.BigInteger(), nullable=False),
        sa.Column("key", sa.LargeBinary(), nullable=False, comment="digest of the validation sets it is made from"),
        sa.Column("validation_set_ids", sa.ARRAY(sa.BigInteger()), nullable=False),
        sa.Column("state", sa.Text(), server_default="pending", nullable=False),
        sa.Column("in_use", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("detail", sa.Text(), nullable=True),
        sa.Column("asked_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("made_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("state IN ('pending', 'ready', 'failed')", name=op.f("direction_sets_state_check")),
        sa.ForeignKeyConstraint(["recipe_id"], ["curator.recipes.id"], name=op.f("direction_sets_recipe_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("direction_sets_pkey")),
        sa.UniqueConstraint("recipe_id", "key", name=op.f("direction_sets_recipe_id_key_key")),
        schema="curator",
        comment="A frozen, ordered list of directions. Arrays in scores follow that order.",
    )
    op.create_index(
        "direction_sets_one_in_use",
        "direction_sets",
        ["recipe_id"],
        unique=True,
        schema="curator",
        postgresql_where=sa.text("in_use"),
    )
    op.create_table(
        "validation_blocks",
        sa.Column("recipe_id", sa.BigInteger(), nullable=False),
        sa.Column("validation_example_id", sa.BigInteger(), nullable=False),
        sa.Column("block", sa.SmallInteger(), nullable=False),
        sa.Column("vector", HALFVEC(), nullable=False),
        sa.ForeignKeyConstraint(["recipe_id"], ["curator.recipes.id"], name=op.f("validation_blocks_recipe_id_fkey")),
        sa.ForeignKeyConstraint(
            ["validation_example_id"],
            ["curator.validation_examples.id"],
            name=op.f("validation_blocks_validation_example_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("recipe_id", "validation_example_id", "block", name=op.f("validation_blocks_pkey")),
        schema="curator",
    )
    op.create_table(
        "validation_gradients",
        sa.Column("recipe_id", sa.BigInteger(), nullable=False),
        sa.Column("validation_example_id", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("loss", sa.REAL(), nullable=True),
        sa.Column("calibrated_loss", sa.REAL(), nullable=True),
        sa.Column("gradient_norm", sa.REAL(), nullable=True),
        sa.Column("whitened_norm", sa.REAL(), nullable=True),
        sa.ForeignKeyConstraint(
            ["recipe_id"], ["curator.recipes.id"], name=op.f("validation_gradients_recipe_id_fkey")
        ),
        sa.ForeignKeyConstraint(
            ["validation_example_id"],
            ["curator.validation_examples.id"],
            name=op.f("validation_gradients_validation_example_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("recipe_id", "validation_example_id", name=op.f("validation_gradients_pkey")),
        schema="curator",
    )
    op.create_table(
        "direction_tensors",
        sa.Column("direction_set_id", sa.BigInteger(), nullable=False),
        sa.Column("part", sa.Text(), nullable=False),
        sa.Column("tensor", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["direction_set_id"], ["curator.direction_sets.id"], name=op.f("direction_tensors_direction_set_id_fkey")
        ),
        sa.PrimaryKeyConstraint("direction_set_id", "part", name=op.f("direction_tensors_pkey")),
        schema="curator",
        comment="Mean vectors and full-space directions as the worker needs them.",
    )
    op.create_table(
        "directions",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("direction_set_id", sa.BigInteger(), nullable=False),
        sa.Column("validation_set_id", sa.BigInteger(), nullable=False),
        sa.Column("slice", sa.Text(), nullable=False),
        sa.Column("ordinal", sa.SmallInteger(), nullable=False, comment="position in the arrays of scores, from 1"),
        sa.Column("n", sa.Integer(), nullable=False, comment="validation examples in the mean"),
        sa.Column(
            "contrast", sa.Integer(), server_default="0", nullable=False, comment="in the mean that is taken from it"
        ),
        sa.ForeignKeyConstraint(
            ["direction_set_id"], ["curator.direction_sets.id"], name=op.f("directions_direction_set_id_fkey")
        ),
        sa.ForeignKeyConstraint(
            ["validation_set_id"], ["curator.validation_sets.id"], name=op.f("directions_validation_set_id_fkey")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("directions_pkey")),
        sa.UniqueConstraint("direction_set_id", "ordinal", name=op.f("directions_direction_set_id_ordinal_key")),
        sa.UniqueConstraint(
            "direction_set_id",
            "validation_set_id",
            "slice",
            name=op.f("directions_direction_set_id_validation_set_id_slice_key"),
        ),
        schema="curator",
    )
    op.create_table(
        "examples",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("external_id", sa.Text(), server_default="", nullable=False),
        sa.Column("source_id", sa.BigInteger(), nullable=False),
        sa.Column("batch_id", sa.BigInteger(), nullable=False),
        sa.Column(
            "record",
            postgresql.JSON(astext_type=sa.Text()),
            nullable=False,
            comment="json, not jsonb: jsonb refuses an escaped NUL",
        ),
        sa.Column("arrived_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("position", sa.BigInteger(), server_default="0", nullable=False, comment="where it was first met"),
        sa.PrimaryKeyConstraint("id", name=op.f("examples_pkey")),
        sa.UniqueConstraint("digest", name=op.f("examples_digest_key")),
        schema="curator",
    )
    op.create_index(op.f("examples_batch_id_idx"), "examples", ["batch_id"], unique=False, schema="curator")
    op.create_index(
        op.f("examples_external_id_idx"),
        "examples",
        ["external_id"],
        unique=False,
        schema="curator",
        postgresql_where=sa.text("external_id <> ''"),
    )
    op.create_index(op.f("examples_source_id_id_idx"), "examples", ["source_id", "id"], unique=False, schema="curator")
    op.create_table(
        "reference_scores",
        sa.Column("direction_set_id", sa.BigInteger(), nullable=False),
        sa.Column("validation_example_id", sa.BigInteger(), nullable=False),
        sa.Column("normalised", sa.ARRAY(sa.REAL()), nullable=False),
        sa.Column("influence", sa.ARRAY(sa.REAL()), nullable=False),
        sa.Column("harm", sa.ARRAY(sa.REAL()), nullable=False),
        sa.Column("self_influence", sa.REAL(), nullable=False),
        sa.ForeignKeyConstraint(
            ["direction_set_id"], ["curator.direction_sets.id"], name=op.f("reference_scores_direction_set_id_fkey")
        ),
        sa.ForeignKeyConstraint(
            ["validation_example_id"],
            ["curator.validation_examples.id"],
            name=op.f("reference_scores_validation_example_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("direction_set_id", "validation_example_id", name=op.f("reference_scores_pkey")),
        schema="curator",
        comment="Trusted examples the directions never saw, scored like arrivals: what p-values are ranks among.",
    )
    op.create_table(
        "selections",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("recipe_id", sa.BigInteger(), nullable=False),
        sa.Column("direction_set_id", sa.BigInteger(), nullable=False),
        sa.Column("budget", sa.BigInteger(), nullable=False),
        sa.Column(
            "unit", sa.Text(), server_default="examples", nullable=False, comment="what the budget is counted in"
        ),
        sa.Column("seed", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column(
            "gain", sa.REAL(), nullable=False, comment="share of the trusted candidates' gradients that it covers"
        ),
        sa.Column("gain_of_random", sa.REAL(), nullable=False, comment="the same for as much, drawn at random"),
        sa.Column("harmful", sa.REAL(), nullable=False, comment="share of it expected to be worse than trusted data"),
        sa.Column("harmful_of_random", sa.REAL(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["direction_set_id"], ["curator.direction_sets.id"], name=op.f("selections_direction_set_id_fkey")
        ),
        sa.ForeignKeyConstraint(["recipe_id"], ["curator.recipes.id"], name=op.f("selections_recipe_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("selections_pkey")),
        sa.UniqueConstraint("name", name=op.f("selections_name_key")),
        schema="curator",
    )
    op.create_table(
        "gradients",
        sa.Column("recipe_id", sa.BigInteger(), nullable=False),
        sa.Column("example_id", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("loss", sa.REAL(), nullable=True),
        sa.Column("calibrated_loss", sa.REAL(), nullable=True),
        sa.Column("gradient_norm", sa.REAL(), nullable=True, comment="of the full gradient of the captured layers"),
        sa.Column(
            "whitened_norm", sa.REAL(), nullable=True, comment="of the kept entries; its square is the self-influence"
        ),
        sa.Column(
            "direction_set_id",
            sa.BigInteger(),
            nullable=True,
            comment="the directions `exact` was taken against, on arrival",
        ),
        sa.Column(
            "exact", sa.ARRAY(sa.REAL()), nullable=True, comment="un-compressed normalised influence on each of them"
        ),
        sa.Column(
            "tokens",
            sa.Integer(),
            server_default="1",
            nullable=False,
            comment="what the workload counts of the record",
        ),
        sa.Column(
            "embedding_similarity",
            sa.ARRAY(sa.REAL()),
            nullable=True,
            comment="control: of the last hidden states, with each of them",
        ),
        sa.Column("bm25", sa.ARRAY(sa.REAL()), nullable=True, comment="control: of the words, for each of them"),
        sa.Column("computed_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("state IN ('ok', 'no_signal', 'nonfinite')", name=op.f("gradients_state_check")),
        sa.ForeignKeyConstraint(["example_id"], ["curator.examples.id"], name=op.f("gradients_example_id_fkey")),
        sa.ForeignKeyConstraint(["recipe_id"], ["curator.recipes.id"], name=op.f("gradients_recipe_id_fkey")),
        sa.PrimaryKeyConstraint("recipe_id", "example_id", name=op.f("gradients_pkey")),
        schema="curator",
    )
    op.create_index(op.f("gradients_example_id_idx"), "gradients", ["example_id"], unique=False, schema="curator")
    op.create_index(
        op.f("gradients_computed_at_idx"),
        "gradients",
        ["computed_at"],
        unique=False,
        schema="curator",
        postgresql_using="brin",
    )
    op.create_table(
        "fidelities",
        sa.Column("direction_set_id", sa.BigInteger(), nullable=False),
        sa.Column(
            "ordinal",
            sa.SmallInteger(),
            nullable=False,
            comment="0: the mean over all directions that are no contrast",
        ),
        sa.Column("day", sa.Date(), nullable=False, comment="of UTC"),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.Column("spearman", sa.REAL(), nullable=False, comment="of compressed with exact normalised influence"),
        sa.Column("measured_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["direction_set_id"], ["curator.direction_sets.id"], name=op.f("fidelities_direction_set_id_fkey")
        ),
        sa.PrimaryKeyConstraint("direction_set_id", "ordinal", "day", name=op.f("fidelities_pkey")),
        schema="curator",
    )
    op.create_table(
        "occurrences",
        sa.Column("example_id", sa.BigInteger(), nullable=False),
        sa.Column("intake_id", sa.BigInteger(), nullable=False),
        sa.Column("external_id", sa.Text(), server_default="", nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False, comment="where it was first met"),
        sa.Column("n", sa.BigInteger(), server_default="1", nullable=False),
        sa.PrimaryKeyConstraint("example_id", "intake_id", "external_id", name=op.f("occurrences_pkey")),
        schema="curator",
        comment="Arrivals of an example after its first, which is the example: most arrive once, and cost no row here.",
    )
    op.create_table(
        "quarantine",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("source_id", sa.BigInteger(), nullable=True),
        sa.Column("intake_id", sa.BigInteger(), nullable=True),
        sa.Column("example_id", sa.BigInteger(), nullable=True),
        sa.Column("position", sa.BigInteger(), nullable=True),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("raw", sa.LargeBinary(), nullable=True, comment="the refused bytes, up to [limits] quarantine_bytes"),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["example_id"], ["curator.examples.id"], name=op.f("quarantine_example_id_fkey")),
        sa.ForeignKeyConstraint(["intake_id"], ["curator.intakes.id"], name=op.f("quarantine_intake_id_fkey")),
        sa.ForeignKeyConstraint(["source_id"], ["curator.sources.id"], name=op.f("quarantine_source_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("quarantine_pkey")),
        sa.UniqueConstraint("example_id", name=op.f("quarantine_example_id_key")),
        sa.UniqueConstraint("intake_id", "position", name=op.f("quarantine_intake_id_position_key")),
        schema="curator",
    )
    op.create_table(
        "scores",
        sa.Column("recipe_id", sa.BigInteger(), nullable=False),
        sa.Column("example_id", sa.BigInteger(), nullable=False),
        sa.Column("direction_set_id", sa.BigInteger(), nullable=False),
        sa.Column("influence", sa.ARRAY(sa.REAL()), nullable=False),
        sa.Column("stderr", sa.ARRAY(sa.REAL()), nullable=False),
        sa.Column("normalised", sa.ARRAY(sa.REAL()), nullable=False),
        sa.Column("percentile", sa.ARRAY(sa.REAL()), nullable=False, comment="share of the references it is above"),
        sa.Column("self_influence", sa.REAL(), nullable=False),
        sa.Column("harm", sa.ARRAY(sa.REAL()), nullable=False),
        sa.Column(
            "p_value", sa.ARRAY(sa.REAL()), nullable=False, comment="conformal: rank of the harm among the references"
        ),
        sa.Column(
            "normalised_stderr",
            sa.ARRAY(sa.REAL()),
            server_default="{}",
            nullable=False,
            comment="of normalised: over validation examples, and of the compression",
        ),
        sa.Column(
            "neighbours",
            sa.ARRAY(sa.REAL()),
            server_default="{}",
            nullable=False,
            comment="mean cosine with the nearest trusted",
        ),
        sa.Column("scored_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint(
            "array_position(influence, 'NaN') IS NULL AND array_position(stderr, 'NaN') IS NULL AND array_position(normalised, 'NaN') IS NULL AND array_position(normalised_stderr, 'NaN') IS NULL",  # noqa: E501
            name=op.f("scores_no_nan_check"),
        ),
        sa.ForeignKeyConstraint(
            ["direction_set_id"], ["curator.direction_sets.id"], name=op.f("scores_direction_set_id_fkey")
        ),
        sa.ForeignKeyConstraint(["example_id"], ["curator.examples.id"], name=op.f("scores_example_id_fkey")),
        sa.ForeignKeyConstraint(["recipe_id"], ["curator.recipes.id"], name=op.f("scores_recipe_id_fkey")),
        sa.PrimaryKeyConstraint("recipe_id", "example_id", name=op.f("scores_pkey")),
        schema="curator",
    )
    op.create_index(op.f("scores_example_id_idx"), "scores", ["example_id"], unique=False, schema="curator")
    op.create_table(
        "selection_examples",
        sa.Column("selection_id", sa.BigInteger(), nullable=False),
        sa.Column("example_id", sa.BigInteger(), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("gain", sa.REAL(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["example_id"], ["curator.examples.id"], name=op.f("selection_examples_example_id_fkey")
        ),
        sa.ForeignKeyConstraint(
            ["selection_id"], ["curator.selections.id"], name=op.f("selection_examples_selection_id_fkey")
        ),
        sa.PrimaryKeyConstraint("selection_id", "example_id", name=op.f("selection_examples_pkey")),
        sa.UniqueConstraint("selection_id", "rank", name=op.f("selection_examples_selection_id_rank_key")),
        schema="curator",
    )
    op.create_table(
        "policy_sets",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("policies", postgresql.JSONB(), nullable=False, comment="what the settings said, by name"),
        sa.Column("in_use", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("policy_sets_pkey")),
        schema="curator",
        comment="What was judged by, each time it changed: going back to former policies is another row.",
    )
    op.create_index(
        "policy_sets_one_in_use",
        "policy_sets",
        ["in_use"],
        unique=True,
        schema="curator",
        postgresql_where=sa.text("in_use"),
    )
    op.create_table(
        "judged_batches",
        sa.Column("batch_id", sa.BigInteger(), nullable=False),
        sa.Column("direction_set_id", sa.BigInteger(), nullable=False),
        sa.Column("policy_set_id", sa.BigInteger(), nullable=False),
        sa.Column("judged", sa.Integer(), nullable=False, comment="examples of the batch"),
        sa.Column(
            "pool", sa.Integer(), nullable=False, comment="examples the false discovery rate was controlled over"
        ),
        sa.Column("refs", sa.Integer(), nullable=False, comment="trusted references the p-values are ranks among"),
        sa.Column("fdr", sa.REAL(), nullable=False),
        sa.Column("flagged", sa.Integer(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["batch_id"], ["curator.batches.id"], name=op.f("judged_batches_batch_id_fkey")),
        sa.ForeignKeyConstraint(
            ["direction_set_id"],
            ["curator.direction_sets.id"],
            name=op.f("judged_batches_direction_set_id_fkey"),
        ),
        sa.ForeignKeyConstraint(
            ["policy_set_id"], ["curator.policy_sets.id"], name=op.f("judged_batches_policy_set_id_fkey")
        ),
        sa.PrimaryKeyConstraint("batch_id", "direction_set_id", "policy_set_id", name=op.f("judged_batches_pkey")),
        schema="curator",
    )
    op.create_table(
        "stream_levels",
        sa.Column("batch_id", sa.BigInteger(), nullable=False),
        sa.Column("direction_set_id", sa.BigInteger(), nullable=False),
        sa.Column("policy_set_id", sa.BigInteger(), nullable=False),
        sa.Column("policy", sa.Text(), nullable=False),
        sa.Column("stream", sa.Text(), nullable=False, comment="a source, or empty: all of them together"),
        sa.Column(
            "ordinal",
            sa.Integer(),
            nullable=False,
            comment="of the batch in its stream, in the order of judging",
        ),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.Column("level", sa.Double(), nullable=False, comment="at which Benjamini-Hochberg runs over the batch"),
        sa.Column("rejected", sa.Integer(), nullable=False),
        sa.Column("augmented", sa.Integer(), nullable=False, comment="rejections if one more p-value were 0"),
        sa.ForeignKeyConstraint(["batch_id"], ["curator.batches.id"], name=op.f("stream_levels_batch_id_fkey")),
        sa.ForeignKeyConstraint(
            ["direction_set_id"], ["curator.direction_sets.id"], name=op.f("stream_levels_direction_set_id_fkey")
        ),
        sa.ForeignKeyConstraint(
            ["policy_set_id"], ["curator.policy_sets.id"], name=op.f("stream_levels_policy_set_id_fkey")
        ),
        sa.PrimaryKeyConstraint(
            "batch_id", "direction_set_id", "policy_set_id", "policy", name=op.f("stream_levels_pkey")
        ),
        sa.UniqueConstraint(
            "direction_set_id",
            "policy_set_id",
            "policy",
            "stream",
            "ordinal",
            name=op.f("stream_levels_direction_set_id_policy_set_id_policy_stream_ordinal_key"),
        ),
        schema="curator",
        comment="False discovery rate over the stream: what each batch took of it.",
    )
    op.create_table(
        "verdicts",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("example_id", sa.BigInteger(), nullable=False),
        sa.Column("verdict", sa.Text(), nullable=False),
        sa.Column("previous", sa.Text(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("review", sa.Text(), nullable=True, comment="keep, drop, relabel or undo, when a person spoke"),
        sa.Column("restores", sa.BigInteger(), comment="undo: the verdict that is in force again; NULL: none"),
        sa.Column("note", sa.Text(), nullable=True),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("policy", sa.Text(), nullable=False),
        sa.Column("policy_version", sa.Text(), nullable=True, comment="digest of what the policy said"),
        sa.Column("policy_set_id", sa.BigInteger(), nullable=True),
        sa.Column("recipe_id", sa.BigInteger(), nullable=True),
        sa.Column("direction_set_id", sa.BigInteger(), nullable=True),
        sa.Column("ordinal", sa.SmallInteger(), nullable=True, comment="the direction that decided"),
        sa.Column("influence", sa.REAL(), nullable=True),
        sa.Column("stderr", sa.REAL(), nullable=True),
        sa.Column("p_value", sa.REAL(), nullable=True),
        sa.Column("q_value", sa.REAL(), nullable=True),
        sa.Column("stream_q", sa.REAL(), nullable=True, comment="q-value within the batch alone"),
        sa.Column(
            "stream_level", sa.REAL(), nullable=True, comment="the level that holds the rate over the whole stream"
        ),
        sa.Column("evidence", postgresql.JSONB(), nullable=True, comment="the scores, and p and q under each policy"),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("review IN ('keep', 'drop', 'relabel', 'undo')", name=op.f("verdicts_review_check")),
        sa.CheckConstraint(
            "verdict IN ('harmful', 'valuable', 'neutral', 'undecided')", name=op.f("verdicts_verdict_check")
        ),
        sa.ForeignKeyConstraint(
            ["direction_set_id"], ["curator.direction_sets.id"], name=op.f("verdicts_direction_set_id_fkey")
        ),
        sa.ForeignKeyConstraint(["example_id"], ["curator.examples.id"], name=op.f("verdicts_example_id_fkey")),
        sa.ForeignKeyConstraint(
            ["policy_set_id"], ["curator.policy_sets.id"], name=op.f("verdicts_policy_set_id_fkey")
        ),
        sa.ForeignKeyConstraint(["recipe_id"], ["curator.recipes.id"], name=op.f("verdicts_recipe_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("verdicts_pkey")),
        schema="curator",
        comment="Append-only. A batch judged twice on the same footing speaks once.",
    )
    op.create_index(op.f("verdicts_example_id_idx"), "verdicts", ["example_id"], unique=False, schema="curator")
    op.create_table(
        "verdicts_in_force",
        sa.Column("example_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("verdict_id", sa.BigInteger(), nullable=False),
        sa.Column("verdict", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["example_id"], ["curator.examples.id"], name=op.f("verdicts_in_force_example_id_fkey")
        ),
        sa.ForeignKeyConstraint(
            ["verdict_id"], ["curator.verdicts.id"], name=op.f("verdicts_in_force_verdict_id_fkey")
        ),
        sa.PrimaryKeyConstraint("example_id", name=op.f("verdicts_in_force_pkey")),
        schema="curator",
    )
    op.create_index(
        op.f("verdicts_in_force_verdict_idx"), "verdicts_in_force", ["verdict"], unique=False, schema="curator"
    )
    op.create_table(
        "reviews",
        sa.Column("verdict_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("example_id", sa.BigInteger(), nullable=False),
        sa.Column("label", sa.Text(), nullable=True, comment="relabel: what the label should be"),
        sa.Column("origin", sa.Text(), nullable=True, comment="the annotation elsewhere that it was imported from"),
        sa.ForeignKeyConstraint(["example_id"], ["curator.examples.id"], name=op.f("reviews_example_id_fkey")),
        sa.ForeignKeyConstraint(["verdict_id"], ["curator.verdicts.id"], name=op.f("reviews_verdict_id_fkey")),
        sa.PrimaryKeyConstraint("verdict_id", name=op.f("reviews_pkey")),
        sa.UniqueConstraint("example_id", "origin", name=op.f("reviews_example_id_origin_key")),
        schema="curator",
        comment="What a review brought besides its word.",
    )
    op.create_table(
        "review_draws",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("flags", sa.BigInteger(), nullable=False, comment="how many flags it was drawn from"),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("review_draws_pkey")),
        schema="curator",
    )
    op.create_table(
        "review_draw_examples",
        sa.Column("draw_id", sa.BigInteger(), nullable=False),
        sa.Column("example_id", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["draw_id"], ["curator.review_draws.id"], name=op.f("review_draw_examples_draw_id_fkey")
        ),
        sa.ForeignKeyConstraint(
            ["example_id"], ["curator.examples.id"], name=op.f("review_draw_examples_example_id_fkey")
        ),
        sa.PrimaryKeyConstraint("draw_id", "example_id", name=op.f("review_draw_examples_pkey")),
        schema="curator",
        comment="Flags drawn at random to be reviewed: only these give an unbiased precision.",
    )
    op.create_table(
        "sketches",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("example_id", sa.BigInteger(), nullable=False),
        sa.Column(
            "bands",
            sa.ARRAY(sa.BigInteger()),
            nullable=False,
            comment="MinHash, a number a band; empty: it says nothing",
        ),
        sa.Column(
            "of_id",
            sa.BigInteger(),
            nullable=True,
            comment="the earlier example it is a near-duplicate of; NULL: it is a head",
        ),
        sa.Column(
            "similarity", sa.REAL(), nullable=True, comment="share of the shingles of both that they have in common"
        ),
        sa.ForeignKeyConstraint(["example_id"], ["curator.examples.id"], name=op.f("sketches_example_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("sketches_pkey")),
        sa.UniqueConstraint(
            "example_id", name=op.f("sketches_example_id_key"), comment="Sketched twice, it is kept once."
        ),
        schema="curator",
    )
    op.create_index(
        "sketches_of_heads",
        "sketches",
        ["bands"],
        unique=False,
        schema="curator",
        postgresql_using="gin",
        postgresql_where=sa.text("of_id IS NULL"),
        postgresql_with={"fastupdate": "off"},
    )
    op.create_table(
        "leaks",
        sa.Column("example_id", sa.BigInteger(), nullable=False),
        sa.Column("validation_example_id", sa.BigInteger(), nullable=False),
        sa.Column("similarity", sa.REAL(), nullable=False),
        sa.ForeignKeyConstraint(["example_id"], ["curator.examples.id"], name=op.f("leaks_example_id_fkey")),
        sa.ForeignKeyConstraint(
            ["validation_example_id"],
            ["curator.validation_examples.id"],
            name=op.f("leaks_validation_example_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("example_id", "validation_example_id", name=op.f("leaks_pkey")),
        schema="curator",
        comment="Examples that are like a validation example. One that is the same is found by its digest.",
    )
    op.create_table(
        "leak_checks",
        sa.Column("validation_set_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column(
            "checked_to", sa.BigInteger(), nullable=False, comment="the last sketch that was held against the set"
        ),
        sa.ForeignKeyConstraint(
            ["validation_set_id"], ["curator.validation_sets.id"], name=op.f("leak_checks_validation_set_id_fkey")
        ),
        sa.PrimaryKeyConstraint("validation_set_id", name=op.f("leak_checks_pkey")),
        schema="curator",
    )
    for name in ("roles", "functions", "views"):
        run((SQL / f"0001_{name}.sql").read_text(encoding="utf-8"))


def run(script: str) -> None:
    """Send a script as it stands: neither SQLAlchemy's colons nor psycopg's percent signs are looked for in it."""
    op.get_bind().connection.driver_connection.execute(script)


def downgrade() -> None:
    """Leave the schema empty but for alembic's own table: this is the first revision, so all data goes."""
    op.execute(
        """
        DO $$
        DECLARE item record;
        BEGIN
            FOR item IN SELECT viewname FROM pg_views WHERE schemaname = 'curator' LOOP
                EXECUTE format('DROP VIEW IF EXISTS curator.%I CASCADE', item.viewname);
            END LOOP;
            FOR item IN SELECT tablename FROM pg_tables
                        WHERE schemaname = 'curator' AND tablename <> 'schema_version' LOOP
                EXECUTE format('DROP TABLE IF EXISTS curator.%I CASCADE', item.tablename);
            END LOOP;
            DROP FUNCTION IF EXISTS curator.offer_inbox, curator.make_partitions, curator.drop_partitions,
                curator.t975, curator.tally_work;
        END $$
        """
    )
