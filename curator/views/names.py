"""The names a user may filter by: one that nothing goes by is a slip of the pen, not an empty list."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection

from curator.errors import NoSuchSlice, NoSuchSource, UnknownSelection
from curator.store import reads
from curator.views.text import nearest

STANDING = "standing"


def require_source(connection: Connection, name: str | None) -> None:
    """Pass when something has come from that source, or none was named.

    Raises:
        NoSuchSource: nothing has, with the nearest that there is.
    """
    if name is not None and name not in (known := reads.source_names(connection)):
        raise NoSuchSource(name=name, suggestion=_did_you_mean(name, known))


def require_slice(connection: Connection, name: str | None) -> None:
    """Pass when a validation set has that slice, or none was named.

    Raises:
        NoSuchSlice: none has, with the nearest that there is.
    """
    if name is not None and name not in (known := reads.slice_names(connection)):
        raise NoSuchSlice(name=name, suggestion=_did_you_mean(name, known))


def require_selection(connection: Connection, name: str | None) -> None:
    """Pass when there is that selection, or none was named; the daemon's own is there even while it is empty.

    Raises:
        UnknownSelection: there is none.
    """
    if name not in (None, STANDING, *reads.selection_names(connection)):
        raise UnknownSelection(name=repr(name))


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    match = nearest(name, known)
    return f" Did you mean {match!r}?" if match else ""
