"""Alembic's entry. ``curator db upgrade`` hands the connection over; there is no alembic.ini to keep in step."""

from alembic import context

from curator.store.tables import SCHEMA, metadata


def only_ours(name: str | None, kind: str, parents: dict[str, str | None]) -> bool:
    """Compare the schema curator and nothing else."""
    return kind != "schema" or name == SCHEMA


def ours(item: object, name: str | None, kind: str, reflected: bool, compare_to: object) -> bool:
    """Partitions are made while running, one for each recipe and block."""
    return not (kind == "table" and reflected and (name or "").startswith("gradient_blocks_"))


connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=metadata,
    include_schemas=True,
    include_name=only_ours,
    include_object=ours,
    version_table="schema_version",
    version_table_schema=SCHEMA,
    transaction_per_migration=True,
)
with context.begin_transaction():
    context.run_migrations()
