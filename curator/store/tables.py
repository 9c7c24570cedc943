"""The tables, as SQLAlchemy Core. Internal: what is public are the views of ``migrations/sql``.

A constraint that makes a delivery idempotent carries a comment with its promise. Vectors live apart from the facts
about them (``gradients`` / ``gradient_blocks``), since a vector is written once and never updated.
"""

from __future__ import annotations

from pgvector.sqlalchemy import HALFVEC
from sqlalchemy import (
    ARRAY,
    REAL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSON, JSONB

SCHEMA = "curator"

metadata = MetaData(
    schema=SCHEMA,
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
        "ck": "%(table_name)s_%(constraint_name)s_check",
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
    },
)


def _id() -> Column[int]:
    return Column("id", BigInteger, Identity(always=True), primary_key=True)


def _now(name: str) -> Column[object]:
    return Column(name, DateTime(timezone=True), nullable=False, server_default=func.now())


def _ref(name: str, target: str, *, nullable: bool = False) -> Column[int]:
    return Column(name, BigInteger, ForeignKey(f"{SCHEMA}.{target}.id"), nullable=nullable)


def _one_of(column: str, *values: str) -> CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=column)


# --- what arrives -----------------------------------------------------------------------------------------

sources = Table(
    "sources",
    metadata,
    _id(),
    Column("name", Text, nullable=False),
    _now("added_at"),
    UniqueConstraint("name"),
)

folders = Table(
    "folders",
    metadata,
    _id(),
    Column("path", Text, nullable=False),
    Column("source", Text, nullable=False, server_default="", comment="empty: the name of each file"),
    _now("added_at"),
    UniqueConstraint("path"),
)

intakes = Table(
    "intakes",
    metadata,
    _id(),
    _ref("source_id", "sources"),
    Column("origin", Text, nullable=False, comment="a file's path, inbox or stdin"),
    Column("digest", LargeBinary, nullable=False, comment="SHA-256 of the file"),
    Column("state", Text, nullable=False, server_default="reading"),
    Column("position", BigInteger, nullable=False, server_default="0", comment="the last line that is in"),
    Column("accepted", BigInteger, nullable=False, server_default="0"),
    Column("duplicates", BigInteger, nullable=False, server_default="0"),
    Column("refused", BigInteger, nullable=False, server_default="0"),
    Column("repaired", BigInteger, nullable=False, server_default="0"),
    Column("detail", Text),
    _now("opened_at"),
    Column("closed_at", DateTime(timezone=True)),
    UniqueConstraint(
        "source_id", "origin", "digest", comment="A file taken twice is read once; half-read, it goes on where it was."
    ),
    _one_of("state", "reading", "complete", "damaged"),
)

batches = Table(
    "batches",
    metadata,
    _id(),
    _ref("intake_id", "intakes"),
    Column("ordinal", Integer, nullable=False),
    Column("examples", Integer, nullable=False, server_default="0"),
    Column("closed", Boolean, nullable=False, server_default=text("false")),
    _now("opened_at"),
    UniqueConstraint("intake_id", "ordinal"),
    # One batch of an intake is open at a time; an inbox has as many closed ones as it has had deliveries.
    Index("batches_one_open", "intake_id", unique=True, postgresql_where=text("NOT closed")),
    comment="Examples of one intake that are judged together: the family of the false discovery rate.",
)

examples = Table(
    "examples",
    metadata,
    _id(),
    Column("digest", LargeBinary, nullable=False),
    Column("external_id", Text, nullable=False, server_default=""),
    # No foreign keys here and in occurrences: checked row by row, four of them cost as much as storing the record.
    Column("source_id", BigInteger, nullable=False),
    Column("batch_id", BigInteger, nullable=False),
    Column("record", JSON, nullable=False, comment="json, not jsonb: jsonb refuses an escaped NUL"),
    _now("arrived_at"),
    Column("position", BigInteger, nullable=False, server_default="0", comment="where it was first met"),
    UniqueConstraint("digest", comment="One example however often it arrives: it is computed once."),
    Index(None, "batch_id"),
    Index(None, "external_id", postgresql_where=text("external_id <> ''")),
    Index(None, "source_id", "id"),
)

occurrences = Table(
    "occurrences",
    metadata,
    Column("example_id", BigInteger, nullable=False),
    Column("intake_id", BigInteger, nullable=False),
    Column("external_id", Text, nullable=False, server_default=""),
    Column("position", BigInteger, nullable=False, comment="where it was first met"),
    Column("n", BigInteger, nullable=False, server_default="1"),
    PrimaryKeyConstraint("example_id", "intake_id", "external_id"),
    comment="Arrivals of an example after its first, which is the example: most arrive once, and cost no row here.",
)

sketches = Table(
    "sketches",
    metadata,
    _id(),
    _ref("example_id", "examples"),
    Column("bands", ARRAY(BigInteger), nullable=False, comment="MinHash, a number a band; empty: it says nothing"),
    Column("of_id", BigInteger, comment="the earlier example it is a near-duplicate of; NULL: it is a head"),
    Column("similarity", REAL, comment="share of the shingles of both that they have in common"),
    UniqueConstraint("example_id", comment="Sketched twice, it is kept once."),
    # Only heads are compared with: a million near-copies of one text must not meet each other.
    # Without the list of pending entries, which every look-up would read from end to end.
    Index(
        "sketches_of_heads",
        "bands",
        postgresql_using="gin",
        postgresql_where=text("of_id IS NULL"),
        postgresql_with={"fastupdate": "off"},
    ),
)

leaks = Table(
    "leaks",
    metadata,
    _ref("example_id", "examples"),
    _ref("validation_example_id", "validation_examples"),
    Column("similarity", REAL, nullable=False),
    PrimaryKeyConstraint("example_id", "validation_example_id"),
    comment="Examples that are like a validation example. One that is the same is found by its digest.",
)

leak_checks = Table(
    "leak_checks",
    metadata,
    Column(
        "validation_set_id",
        BigInteger,
        ForeignKey(f"{SCHEMA}.validation_sets.id"),
        primary_key=True,
        autoincrement=False,
    ),
    Column("checked_to", BigInteger, nullable=False, comment="the last sketch that was held against the set"),
)

inbox = Table(
    "inbox",
    metadata,
    _id(),
    Column("source", Text, nullable=False),
    Column("record", JSON, nullable=False),
    _now("received_at"),
    comment="INSERT INTO curator.inbox (source, record): plain SQL is a way in. A row leaves when it is taken.",
)

quarantine = Table(
    "quarantine",
    metadata,
    _id(),
    _ref("source_id", "sources", nullable=True),
    _ref("intake_id", "intakes", nullable=True),
    _ref("example_id", "examples", nullable=True),
    Column("position", BigInteger),
    Column("code", Text, nullable=False),
    Column("detail", Text, nullable=False),
    Column("raw", LargeBinary, comment="the refused bytes, up to [limits] quarantine_bytes"),
    _now("at"),
    UniqueConstraint("intake_id", "position", comment="A line read again after a crash is refused once."),
    UniqueConstraint("example_id", comment="An example is given up once."),
)

# --- what it is measured with -----------------------------------------------------------------------------

checkpoints = Table(
    "checkpoints",
    metadata,
    _id(),
    Column("name", Text, nullable=False),
    Column("path", Text, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column("in_use", Boolean, nullable=False, server_default=text("false")),
    _now("added_at"),
    UniqueConstraint("name"),
    Index("checkpoints_one_in_use", "in_use", unique=True, postgresql_where=text("in_use")),
)

validation_sets = Table(
    "validation_sets",
    metadata,
    _id(),
    Column("name", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("slice_field", Text, nullable=False, server_default=""),
    Column("digest", LargeBinary, nullable=False),
    Column("in_use", Boolean, nullable=False, server_default=text("true")),
    _now("added_at"),
    UniqueConstraint("name", "version"),
    Index("validation_sets_one_in_use", "name", unique=True, postgresql_where=text("in_use")),
)

validation_examples = Table(
    "validation_examples",
    metadata,
    _id(),
    _ref("validation_set_id", "validation_sets"),
    Column("digest", LargeBinary, nullable=False),
    Column("external_id", Text, nullable=False, server_default=""),
    Column("record", JSON, nullable=False),
    Column("slice", Text, nullable=False),
    Column("role", Text, nullable=False),
    UniqueConstraint("validation_set_id", "digest"),
    _one_of("role", "direction", "reference", "contrast", "rehearsal"),
)

recipes = Table(
    "recipes",
    metadata,
    _id(),
    Column("key", LargeBinary, nullable=False, comment="digest of everything that makes gradients comparable"),
    _ref("checkpoint_id", "checkpoints"),
    Column("spec", JSONB, nullable=False, comment="what was asked for; nothing filters on it"),
    Column("fitted_on", ARRAY(BigInteger), comment="the validation sets whose directions' examples it was fitted on"),
    Column("dimension", Integer),
    Column("temperature", REAL, comment="of the checkpoint, on trusted data; 1 is calibrated, above is overconfident"),
    Column("state", Text, nullable=False, server_default="fitting"),
    Column("in_use", Boolean, nullable=False, server_default=text("false")),
    _now("added_at"),
    UniqueConstraint("key", comment="The same checkpoint and settings are one recipe."),
    Index("recipes_one_in_use", "in_use", unique=True, postgresql_where=text("in_use")),
    _one_of("state", "fitting", "ready"),
)

curvatures = Table(
    "curvatures",
    metadata,
    _ref("recipe_id", "recipes"),
    Column("part", Text, nullable=False),
    Column("tensor", LargeBinary, nullable=False, comment="one tensor as safetensors"),
    PrimaryKeyConstraint("recipe_id", "part"),
    comment="What is frozen with a recipe: Fisher eigenbases of the kept entries, Kronecker factors.",
)

direction_sets = Table(
    "direction_sets",
    metadata,
    _id(),
    _ref("recipe_id", "recipes"),
    Column("key", LargeBinary, nullable=False, comment="digest of the validation sets it is made from"),
    Column("validation_set_ids", ARRAY(BigInteger), nullable=False),
    Column("state", Text, nullable=False, server_default="pending"),
    Column("in_use", Boolean, nullable=False, server_default=text("false")),
    Column("detail", Text),
    _now("asked_at"),
    Column("made_at", DateTime(timezone=True)),
    UniqueConstraint("recipe_id", "key"),
    Index("direction_sets_one_in_use", "recipe_id", unique=True, postgresql_where=text("in_use")),
    _one_of("state", "pending", "ready", "failed"),
    comment="A frozen, ordered list of directions. Arrays in scores follow that order.",
)

directions = Table(
    "directions",
    metadata,
    _id(),
    _ref("direction_set_id", "direction_sets"),
    _ref("validation_set_id", "validation_sets"),
    Column("slice", Text, nullable=False),
    Column("ordinal", SmallInteger, nullable=False, comment="position in the arrays of scores, from 1"),
    Column("n", Integer, nullable=False, comment="validation examples in the mean"),
    Column("contrast", Integer, nullable=False, server_default="0", comment="in the mean that is taken from it"),
    UniqueConstraint("direction_set_id", "ordinal"),
    UniqueConstraint("direction_set_id", "validation_set_id", "slice"),
)

direction_tensors = Table(
    "direction_tensors",
    metadata,
    _ref("direction_set_id", "direction_sets"),
    Column("part", Text, nullable=False),
    Column("tensor", LargeBinary, nullable=False),
    PrimaryKeyConstraint("direction_set_id", "part"),
    comment="Mean vectors and full-space directions as the worker needs them.",
)

validation_gradients = Table(
    "validation_gradients",
    metadata,
    _ref("recipe_id", "recipes"),
    _ref("validation_example_id", "validation_examples"),
    Column("state", Text, nullable=False),
    Column("loss", REAL),
    Column("calibrated_loss", REAL),
    Column("gradient_norm", REAL),
    Column("whitened_norm", REAL),
    PrimaryKeyConstraint("recipe_id", "validation_example_id"),
)

validation_blocks = Table(
    "validation_blocks",
    metadata,
    _ref("recipe_id", "recipes"),
    _ref("validation_example_id", "validation_examples"),
    Column("block", SmallInteger, nullable=False),
    Column("vector", HALFVEC, nullable=False),
    PrimaryKeyConstraint("recipe_id", "validation_example_id", "block"),
)

reference_scores = Table(
    "reference_scores",
    metadata,
    _ref("direction_set_id", "direction_sets"),
    _ref("validation_example_id", "validation_examples"),
    Column("normalised", ARRAY(REAL), nullable=False),
    Column("influence", ARRAY(REAL), nullable=False),
    Column("harm", ARRAY(REAL), nullable=False),
    Column("self_influence", REAL, nullable=False),
    PrimaryKeyConstraint("direction_set_id", "validation_example_id"),
    comment="Trusted examples the directions never saw, scored like arrivals: what p-values are ranks among.",
)

# --- what is computed -------------------------------------------------------------------------------------

gradients = Table(
    "gradients",
    metadata,
    _ref("recipe_id", "recipes"),
    _ref("example_id", "examples"),
    Column("state", Text, nullable=False),
    Column("loss", REAL),
    Column("calibrated_loss", REAL),
    Column("gradient_norm", REAL, comment="of the full gradient of the captured layers"),
    Column("whitened_norm", REAL, comment="of the kept entries; its square is the self-influence"),
    Column("direction_set_id", BigInteger, comment="the directions `exact` was taken against, on arrival"),
    Column(
        "exact",
        ARRAY(REAL),
        comment="normalised influence on each of them before the mask: of [scores] exact_rank rows and columns a layer "
        "(auto: all up to 2 GiB, else 64) and lengths off [scores] exact_sketch products a side, whole "
        "where these are 0",
    ),
    Column("tokens", Integer, nullable=False, server_default="1", comment="what the workload counts of the record"),
    Column("cut_tokens", Integer, nullable=False, server_default="0", comment="beyond the limit: not seen"),
    Column("embedding_similarity", ARRAY(REAL), comment="control: of the last hidden states, with each of them"),
    Column("bm25", ARRAY(REAL), comment="control: of the words, for each of them"),
    _now("computed_at"),
    PrimaryKeyConstraint("recipe_id", "example_id", comment="Delivered twice, computed twice, kept once."),
    _one_of("state", "ok", "no_signal", "nonfinite"),
    Index(None, "example_id"),
    # Rows come in the order of time, so a few kilobytes say where the last days are.
    Index(None, "computed_at", postgresql_using="brin"),
)

fidelities = Table(
    "fidelities",
    metadata,
    _ref("direction_set_id", "direction_sets"),
    Column("ordinal", SmallInteger, nullable=False, comment="0: the mean over all directions that are no contrast"),
    Column("day", Date, nullable=False, comment="of UTC"),
    Column("n", Integer, nullable=False),
    Column("spearman", REAL, nullable=False, comment="of compressed with exact normalised influence"),
    _now("measured_at"),
    PrimaryKeyConstraint("direction_set_id", "ordinal", "day", comment="Measured again, a day is replaced."),
)

gradient_blocks = Table(
    "gradient_blocks",
    metadata,
    Column("recipe_id", BigInteger, nullable=False),
    Column("block", SmallInteger, nullable=False),
    Column("example_id", BigInteger, nullable=False),
    Column("vector", HALFVEC, nullable=False, comment="a block of the whitened unit vector"),
    PrimaryKeyConstraint("recipe_id", "block", "example_id"),
    postgresql_partition_by="LIST (recipe_id)",
)

scores = Table(
    "scores",
    metadata,
    _ref("recipe_id", "recipes"),
    _ref("example_id", "examples"),
    _ref("direction_set_id", "direction_sets"),
    Column("influence", ARRAY(REAL), nullable=False),
    Column("stderr", ARRAY(REAL), nullable=False),
    Column("normalised", ARRAY(REAL), nullable=False),
    Column("percentile", ARRAY(REAL), nullable=False, comment="share of the references it is above"),
    Column("self_influence", REAL, nullable=False),
    Column("harm", ARRAY(REAL), nullable=False),
    Column("p_value", ARRAY(REAL), nullable=False, comment="conformal: rank of the harm among the references"),
    Column(
        "normalised_stderr",
        ARRAY(REAL),
        nullable=False,
        server_default="{}",
        comment="of normalised: over validation examples, and of the compression",
    ),
    Column(
        "neighbours", ARRAY(REAL), nullable=False, server_default="{}", comment="mean cosine with the nearest trusted"
    ),
    _now("scored_at"),
    Column(
        "familiarity", ARRAY(REAL), nullable=False, server_default="{}", comment="mean size of the cosines with them"
    ),
    PrimaryKeyConstraint("recipe_id", "example_id", comment="One row an example; scored again, it is replaced."),
    CheckConstraint(
        "array_position(influence, 'NaN') IS NULL AND array_position(stderr, 'NaN') IS NULL"
        " AND array_position(normalised, 'NaN') IS NULL AND array_position(normalised_stderr, 'NaN') IS NULL",
        name="no_nan",
    ),
    Index(None, "example_id"),
)

# --- what is decided --------------------------------------------------------------------------------------

policy_sets = Table(
    "policy_sets",
    metadata,
    _id(),
    Column("digest", LargeBinary, nullable=False),
    Column("policies", JSONB, nullable=False, comment="what the settings said, by name"),
    Column("in_use", Boolean, nullable=False, server_default=text("true")),
    _now("at"),
    Index("policy_sets_one_in_use", "in_use", unique=True, postgresql_where=text("in_use")),
    comment="What was judged by, each time it changed: going back to former policies is another row.",
)

verdicts = Table(
    "verdicts",
    metadata,
    _id(),
    _ref("example_id", "examples"),
    Column("verdict", Text, nullable=False),
    Column("previous", Text),
    Column("reason", Text, nullable=False),
    Column("review", Text, comment="keep, drop, relabel or undo, when a person spoke"),
    Column("restores", BigInteger, comment="undo: the verdict that is in force again; NULL: none"),
    Column("note", Text),
    Column("actor", Text, nullable=False),
    Column("policy", Text, nullable=False),
    Column("policy_version", Text, comment="digest of what the policy said"),
    _ref("policy_set_id", "policy_sets", nullable=True),
    _ref("recipe_id", "recipes", nullable=True),
    _ref("direction_set_id", "direction_sets", nullable=True),
    Column("ordinal", SmallInteger, comment="the direction that decided"),
    Column("influence", REAL),
    Column("stderr", REAL),
    Column("p_value", REAL),
    Column("q_value", REAL),
    Column("stream_q", REAL, comment="q-value within the batch alone"),
    Column("stream_level", REAL, comment="the level that holds the rate over the whole stream"),
    Column("evidence", JSONB, comment="the scores, and p and q under each policy"),
    _now("at"),
    _one_of("verdict", "harmful", "valuable", "neutral", "undecided"),
    _one_of("review", "keep", "drop", "relabel", "undo"),
    Index(None, "example_id"),
    comment="Append-only. A batch judged twice on the same footing speaks once.",
)

verdicts_in_force = Table(
    "verdicts_in_force",
    metadata,
    Column("example_id", BigInteger, ForeignKey(f"{SCHEMA}.examples.id"), primary_key=True, autoincrement=False),
    _ref("verdict_id", "verdicts"),
    Column("verdict", Text, nullable=False),
    Index(None, "verdict"),
)

reviews = Table(
    "reviews",
    metadata,
    Column("verdict_id", BigInteger, ForeignKey(f"{SCHEMA}.verdicts.id"), primary_key=True, autoincrement=False),
    _ref("example_id", "examples"),
    Column("label", Text, comment="relabel: what the label should be"),
    Column("origin", Text, comment="the annotation elsewhere that it was imported from"),
    UniqueConstraint("example_id", "origin", comment="An annotation imported twice speaks once."),
    comment="What a review brought besides its word.",
)

review_draws = Table(
    "review_draws",
    metadata,
    _id(),
    Column("seed", BigInteger, nullable=False),
    Column("flags", BigInteger, nullable=False, comment="how many flags it was drawn from"),
    Column("actor", Text, nullable=False),
    _now("at"),
)

review_draw_examples = Table(
    "review_draw_examples",
    metadata,
    _ref("draw_id", "review_draws"),
    _ref("example_id", "examples"),
    PrimaryKeyConstraint("draw_id", "example_id"),
    comment="Flags drawn at random to be reviewed: only these give an unbiased precision.",
)

judged_batches = Table(
    "judged_batches",
    metadata,
    _ref("batch_id", "batches"),
    _ref("direction_set_id", "direction_sets"),
    _ref("policy_set_id", "policy_sets"),
    Column("judged", Integer, nullable=False, comment="examples of the batch"),
    Column("pool", Integer, nullable=False, comment="examples the false discovery rate was controlled over"),
    Column("refs", Integer, nullable=False, comment="trusted references the p-values are ranks among"),
    Column("fdr", REAL, nullable=False),
    Column("flagged", Integer, nullable=False),
    _now("at"),
    PrimaryKeyConstraint("batch_id", "direction_set_id", "policy_set_id", comment="Judged again, it is replaced."),
)

stream_levels = Table(
    "stream_levels",
    metadata,
    _ref("batch_id", "batches"),
    _ref("direction_set_id", "direction_sets"),
    _ref("policy_set_id", "policy_sets"),
    Column("policy", Text, nullable=False),
    Column("stream", Text, nullable=False, comment="a source, or empty: all of them together"),
    Column("ordinal", Integer, nullable=False, comment="of the batch in its stream, in the order of judging"),
    Column("n", Integer, nullable=False),
    Column("level", Double, nullable=False, comment="at which Benjamini-Hochberg runs over the batch"),
    Column("rejected", Integer, nullable=False),
    Column("augmented", Integer, nullable=False, comment="rejections if one more p-value were 0"),
    PrimaryKeyConstraint("batch_id", "direction_set_id", "policy_set_id", "policy"),
    UniqueConstraint("direction_set_id", "policy_set_id", "policy", "stream", "ordinal"),
    comment="False discovery rate over the stream: what each batch took of it.",
)

selections = Table(
    "selections",
    metadata,
    _id(),
    Column("name", Text, nullable=False),
    _ref("recipe_id", "recipes"),
    _ref("direction_set_id", "direction_sets"),
    Column("budget", BigInteger, nullable=False),
    Column("unit", Text, nullable=False, server_default="examples", comment="what the budget is counted in"),
    Column("seed", BigInteger, nullable=False, server_default="0"),
    Column("gain", REAL, nullable=False, comment="share of the trusted candidates' gradients that it covers"),
    Column("gain_of_random", REAL, nullable=False, comment="the same for as much, drawn at random"),
    Column("harmful", REAL, nullable=False, comment="share of it expected to be worse than trusted data"),
    Column("harmful_of_random", REAL, nullable=False),
    Column("actor", Text, nullable=False),
    _now("at"),
    UniqueConstraint("name"),
)

selection_examples = Table(
    "selection_examples",
    metadata,
    _ref("selection_id", "selections"),
    _ref("example_id", "examples"),
    Column("rank", Integer, nullable=False),
    Column("gain", REAL, nullable=False),
    Column("reason", Text, nullable=False),
    PrimaryKeyConstraint("selection_id", "example_id"),
    UniqueConstraint("selection_id", "rank"),
)

# --- what training has shown ------------------------------------------------------------------------------

verifications = Table(
    "verifications",
    metadata,
    _id(),
    _ref("recipe_id", "recipes"),
    _ref("direction_set_id", "direction_sets"),
    Column("selection", Text, comment="whose choice is verified too; NULL: none"),
    Column("held_out", Text, comment="the file of held-out examples; NULL: the references"),
    Column("seeds", Integer, nullable=False),
    Column("draws", Integer, nullable=False, comment="of each random arm, for each seed"),
    Column("seed", BigInteger, nullable=False),
    Column("epochs", Integer, comment="NULL, as below: what the workload says"),
    Column("batch", Integer),
    Column("learning_rate", Double),
    Column("pool", ARRAY(BigInteger), nullable=False, comment="the examples there were to train on"),
    Column("state", Text, nullable=False, server_default="running"),
    Column("detail", Text, comment="what it failed of"),
    Column("actor", Text, nullable=False),
    _now("at"),
    Column("finished_at", DateTime(timezone=True)),
    _one_of("state", "running", "done", "failed", "cancelled"),
    comment="Proof by training. What each run is trained on and measured with is decided when it is asked for.",
)

verification_records = Table(
    "verification_records",
    metadata,
    _ref("verification_id", "verifications"),
    Column("position", BigInteger, nullable=False),
    Column("record", JSON, nullable=False),
    PrimaryKeyConstraint("verification_id", "position"),
    comment="Held-out examples that came from a file.",
)

verification_trials = Table(
    "verification_trials",
    metadata,
    _id(),
    _ref("verification_id", "verifications"),
    Column("arm", Text, nullable=False),
    Column("draw", Integer, nullable=False, comment="of a random arm, from 1; 0: it is no random one"),
    Column("picked", ARRAY(BigInteger), comment="these of the pool; NULL: all of it"),
    Column("left_out", ARRAY(BigInteger), comment="less these"),
    Column("examples", Integer, nullable=False),
    Index(None, "verification_id"),
)

verification_runs = Table(
    "verification_runs",
    metadata,
    _id(),
    _ref("trial_id", "verification_trials"),
    Column("seed", BigInteger, nullable=False),
    Column("validation_loss", ARRAY(REAL), comment="of each example behind the directions, in their order"),
    Column("validation_correct", ARRAY(REAL)),
    Column("held_out_loss", ARRAY(REAL)),
    Column("held_out_correct", ARRAY(REAL)),
    Column("training", Text, comment="how it was trained"),
    Column("seconds", REAL),
    Column("finished_at", DateTime(timezone=True)),
    UniqueConstraint("trial_id", "seed", comment="Trained twice, it is kept once."),
)

verification_results = Table(
    "verification_results",
    metadata,
    _ref("verification_id", "verifications"),
    Column("arm", Text, nullable=False),
    Column("beside", Text, nullable=False, comment="the arm it is compared with"),
    Column("part", Text, nullable=False),
    Column("slice", Text, nullable=False, comment="set/slice; empty: all of them together"),
    Column("measure", Text, nullable=False),
    Column("mean", Double, nullable=False, comment="of the arm itself"),
    Column("effect", Double, nullable=False, comment="how much better than the other; positive helps"),
    Column("ci_low", Double, nullable=False),
    Column("ci_high", Double, nullable=False),
    PrimaryKeyConstraint("verification_id", "arm", "beside", "part", "slice", "measure"),
    _one_of("part", "validation", "held-out"),
    _one_of("measure", "loss", "accuracy"),
)

# --- what is left to do -----------------------------------------------------------------------------------

work = Table(
    "work",
    metadata,
    _id(),
    Column("stage", Text, nullable=False),
    Column("recipe_id", BigInteger, nullable=False, server_default="0", comment="0: before any recipe"),
    Column(
        "subject",
        BigInteger,
        nullable=False,
        comment="inbox row or intake, direction set, example, batch or run: by the stage",
    ),
    Column("kind", Text, nullable=False, server_default="", comment="examples: inbox or file"),
    Column("batch_id", BigInteger),
    Column("state", Text, nullable=False, server_default="ready"),
    Column("priority", SmallInteger, nullable=False, server_default="0"),
    Column("attempts", SmallInteger, nullable=False, server_default="0", comment="workers that died on it"),
    Column("owner", Text),
    Column("leased_at", DateTime(timezone=True)),
    Column("lease_until", DateTime(timezone=True)),
    Column("not_before", DateTime(timezone=True), nullable=False, server_default=text("to_timestamp(0)")),
    _now("offered_at"),
    Column("last_error", Text),
    UniqueConstraint("stage", "kind", "recipe_id", "subject", comment="Offered twice, it is one piece of work."),
    _one_of("state", "ready", "leased", "done", "quarantined"),
    Index(
        "work_claimable",
        *("stage", "kind", "priority", "attempts", text("recipe_id DESC"), "id"),
        postgresql_where=text("state = 'ready'"),
    ),
    Index("work_leased", "lease_until", postgresql_where=text("state = 'leased'")),
    Index("work_open_of_batch", "batch_id", "recipe_id", postgresql_where=text("state IN ('ready', 'leased')")),
    Index("work_oldest", "stage", "state", "offered_at", postgresql_where=text("state IN ('ready', 'leased')")),
    Index(
        "work_troubled",
        "id",
        postgresql_where=text("last_error IS NOT NULL AND state IN ('ready', 'quarantined')"),
    ),
    comment="The ledger. The database decides what is left; a Celery message only says there is some.",
)

work_tallies = Table(
    "work_tallies",
    metadata,
    Column("stage", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("n", BigInteger, nullable=False),
    comment="Differences noted by triggers on work; their sum is how much there is of a stage and state.",
)

jobs = Table(
    "jobs",
    metadata,
    Column("job", Text, nullable=False),
    Column("window", BigInteger, nullable=False, comment="the schedule's period, counted from the epoch"),
    Column("owner", Text, nullable=False),
    Column("others", Integer, nullable=False, server_default="0", comment="who came second"),
    _now("at"),
    PrimaryKeyConstraint("job", "window", comment="Two schedulers do scheduled work once."),
)
