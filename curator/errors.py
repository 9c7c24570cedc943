"""Every way curator can refuse, as one tree.

::

    CuratorError
    |-- UsageError        the operator asked for something that cannot be      exit 2, never retried
    |-- DependencyDown    a database, broker or device does not answer         exit 3, retried with backoff
    `-- DataError         one record, file or checkpoint is at fault           exit 2, quarantined or refused

A leaf's docstring IS its message (a format string over the keyword arguments), ``code`` never changes its
meaning once released, and ``hint`` is the fix. ``curator explain CODE`` prints all three, so a leaf is
documented where it is defined and nowhere else.
"""

from __future__ import annotations

import inspect
from typing import ClassVar


class CuratorError(Exception):
    """Something went wrong."""

    code: ClassVar[str] = ""
    hint: ClassVar[str] = ""
    exit_code: ClassVar[int] = 2

    def __init__(self, **facts: object) -> None:
        self.facts = facts
        super().__init__(self.template().format(**facts))

    @classmethod
    def template(cls) -> str:
        """The message with its fields still open, as one line."""
        return " ".join(inspect.cleandoc(cls.__doc__ or "").split())

    @property
    def fix(self) -> str:
        """The hint, with the same facts filled in."""
        return self.hint.format(**self.facts)


class UsageError(CuratorError):
    """The operator asked for something that cannot be done."""


class DependencyDown(CuratorError):
    """Something curator depends on does not answer."""

    exit_code = 3


class DataError(CuratorError):
    """A record, a file or a checkpoint is at fault."""


# --- settings and project ---------------------------------------------------------------------------------


class NoProject(UsageError):
    """There is no curator.toml in {directory} or in any directory above it."""

    code = "CUR-CFG-001"
    hint = "Run `curator init` in the directory that should hold the project, or pass --project DIR."


class UnknownSetting(UsageError):
    """{where} has no setting {key!r}.{suggestion}"""

    code = "CUR-CFG-002"
    hint = "`curator config show` lists every setting with its value and where it came from."


class BadSetting(UsageError):
    """{key} = {value!r} ({origin}) is not {expected}."""

    code = "CUR-CFG-003"
    hint = "Correct it in {origin}; `curator config show` prints what is in force."


class BadToml(UsageError):
    """{path} is not valid TOML: {reason}"""

    code = "CUR-CFG-004"
    hint = "Correct the line named in the message."


# --- database and broker ----------------------------------------------------------------------------------


class DatabaseDown(DependencyDown):
    """The database at {url} does not answer: {reason}"""

    code = "CUR-DB-001"
    hint = "Start it, or correct [database] url (`curator doctor` checks it). With an empty url curator runs its own."


class SchemaBehind(UsageError):
    """The database schema is at revision {found}, this curator needs {needed}."""

    code = "CUR-DB-002"
    hint = "Run `curator db upgrade` (older database), or install the curator that wrote it (newer database)."


class NoPgvector(UsageError):
    """The database at {url} has no pgvector {needed} or later ({found})."""

    code = "CUR-DB-003"
    hint = "Install pgvector >= {needed} on the server and run `CREATE EXTENSION vector` as a superuser."


class QueryRefused(UsageError):
    """The query was refused: {reason}"""

    code = "CUR-SQL-001"
    hint = "One read-only statement over the views of schema curator; `curator sql` without a query lists them."


class BrokerDown(DependencyDown):
    """The broker at {url} does not answer: {reason}"""

    code = "CUR-BRK-001"
    hint = "Start it, or correct [broker] url. No work is lost: the database knows what is left."
