"""Alembic's entry. ``curator db upgrade`` hands the connection over; there is no alembic.ini to keep in step."""

from alembic import context

from curator.store.migrate import COMPARED
from curator.store.tables import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, transaction_per_migration=True, **COMPARED)
with context.begin_transaction():
    context.run_migrations()
