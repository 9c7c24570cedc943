"""The report as one HTML file: no script, nothing fetched, everything escaped, written whole or not at all."""

from __future__ import annotations

import datetime
import os
import tempfile
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from curator.errors import CannotWrite
from curator.views import plots
from curator.views.report import P_BINS, Report, Uniformity
from curator.views.text import counted, inert


def write(report: Report, out: Path) -> None:
    """Put the page at ``out``; a former one is there until the new one is complete.

    Raises:
        CannotWrite: the disk says no.
    """
    body = render(report)
    made: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)
        made = Path(name)
        with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123 - a descriptor, not a path
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        made.chmod(0o644)
        made.replace(out)
    except OSError as error:
        raise CannotWrite(path=out, reason=error.strerror or error) from error
    finally:
        if made is not None:
            made.unlink(missing_ok=True)


def render(report: Report) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("curator.views", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_inert,
    )
    environment.filters |= {
        **{"number": number, "signed": signed, "moment": moment, "share": share, "plain": plain},
        "counted": counted,
    }
    environment.globals |= {
        "histogram": plots.histogram,
        "forest": plots.forest,
        "scatter": plots.scatter,
        "expected": expected,
        "interval": interval,
    }
    return environment.get_template("page.html").render(report=report, plots=plots)


def _inert(value: object) -> object:
    """Escaping keeps ``<`` from acting; this keeps bidi controls and escapes from it."""
    return inert(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def number(value: float | None) -> str:
    """A number as short as it may be."""
    if value is None:
        return "–"  # noqa: RUF001 - a dash for nothing
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def signed(value: float | None) -> str:
    """A difference, with its sign in front."""
    return number(value) if value is None else f"{value:+.3g}"


def interval(low: float | None, high: float | None) -> str:
    """Both ends; a dash for what too few examples cannot say."""
    return number(None) if low is None or high is None else f"{low:.2g} to {high:.2g}"


def plain(n: int) -> tuple[int, int]:
    """A bin of a histogram with nothing marked in it."""
    return n, 0


def share(value: float | None) -> str:
    """A share as per cent."""
    return "–" if value is None else f"{value:.1%}"  # noqa: RUF001


def moment(value: datetime.datetime) -> str:
    """A time, in UTC: the page is read elsewhere."""
    return value.astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def expected(uniformity: Uniformity) -> float:
    """How high the bars of the p-values would be if all arrivals of the bulk were harmless."""
    return uniformity.bulk / (P_BINS / 2)
