"""Files behind a URL: fetched whole before they are read, so that what is read twice is the same twice.

What may be fetched is a list of prefixes of the operator's. Nothing is by default: a URL in a script or a manifest must
not reach what only this machine can see.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from curator.errors import ExtraMissing, Unreadable, UrlNotAllowed
from curator.sources.jsonl import shown

BLOCK: Final = 1 << 22
_URL: Final = re.compile(r"([a-z][a-z0-9+.-]*)://(.+)")
_NEVER: Final = re.compile(r"::|\\|[?#@%]|[\x00-\x20]|(^|/)\.\.?(/|$)")
_EXTRAS: Final = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}


def is_url(given: str) -> bool:
    """Whether it is meant as a URL and not as a path."""
    return _URL.fullmatch(given) is not None


def require_allowed(url: str, prefixes: Sequence[str]) -> None:
    """Raise unless a URL lies below one of the prefixes.

    Raises:
        UrlNotAllowed: it does not, or it could mean another place than it seems to.
    """
    found = _URL.fullmatch(url)
    below = any(url == prefix.rstrip("/") or url.startswith(prefix.rstrip("/") + "/") for prefix in prefixes)
    if not found or _NEVER.search(found[2]) or not below or not _stays(found[1], found[2], prefixes):
        raise UrlNotAllowed(url=url, allowed=", ".join(prefixes) or "none")


def _stays(scheme: str, rest: str, prefixes: Sequence[str]) -> bool:
    """Whether a file of this machine is, through all its links, where the prefix says."""
    if scheme not in ("file", "local"):
        return True
    real = Path(rest).resolve()
    roots = [
        Path(found[2]).resolve() for prefix in prefixes if (found := _URL.fullmatch(prefix)) and found[1] == scheme
    ]
    return any(real.is_relative_to(root) for root in roots)


def blocks(url: str, options: Mapping[str, Any]) -> Iterator[bytes]:
    """The content of a URL, some megabytes at a time.

    Args:
        url: checked by ``require_allowed``.
        options: keyword arguments of the fsspec file system.

    Raises:
        ExtraMissing: the package for its scheme is not installed.
        Unreadable: it cannot be opened, or breaks off.
    """
    import fsspec

    scheme = url.partition("://")[0]
    try:
        with fsspec.open(url, "rb", **options) as stream:
            while block := stream.read(BLOCK):
                yield block
    except ImportError as error:
        package = getattr(error, "name", None) or str(error)
        raise ExtraMissing(purpose=f"Reading {scheme}://", package=package, extra=_EXTRAS.get(scheme, scheme)) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise Unreadable(path=shown(Path(url)).replace(":/", "://", 1), reason=reason) from error
