"""One frozen ``Settings``, built once and handed down.

Precedence: command-line flag, ``CURATOR_SECTION_KEY`` in the environment (or ``..._FILE``, a file that holds the
value), ``curator.toml``, default. The dataclasses below are the only list of settings there is: parsing, checking,
``config show`` and the did-you-mean all read it.
"""

from __future__ import annotations

import difflib
import os
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from curator.errors import BadSetting, BadToml, NoProject, UnknownSetting

FILE_NAME = "curator.toml"


@dataclass(frozen=True, slots=True)
class Database:
    """Where Postgres is."""

    url: str = field(default="", metadata={"secret": True, "doc": "empty: an embedded PostgreSQL in .curator/"})


@dataclass(frozen=True, slots=True)
class Broker:
    """Where the Redis-protocol broker is."""

    url: str = field(default="", metadata={"secret": True, "doc": "empty: an embedded Valkey in .curator/"})


@dataclass(frozen=True, slots=True)
class Workload:
    """What the user's model is."""

    kind: Literal["causal-lm", "text-classifier", "torch"] = "text-classifier"
    factory: str = field(default="", metadata={"doc": 'kind = "torch": "my_module:build"'})
    options: Mapping[str, Any] = field(
        default_factory=dict, metadata={"doc": "keyword arguments of the workload, a table"}
    )


@dataclass(frozen=True, slots=True)
class Gradients:
    """How a gradient is compressed."""

    mask: Literal["coordinate", "neuron"] = "coordinate"
    dimension: int = field(default=1984, metadata={"doc": "kept entries an example, over all layers"})
    layers: tuple[str, ...] = field(default=(), metadata={"doc": "name patterns; empty: every linear layer"})
    seed: int = 0
    exact: bool = field(default=True, metadata={"doc": "un-compressed scores on arrival"})
    batch: int = field(default=256, metadata={"doc": "examples a forward pass"})
    device: str = field(default="auto", metadata={"doc": "auto, cpu, cuda, cuda:1"})


@dataclass(frozen=True, slots=True)
class Scores:
    """How influence is computed."""

    damping: float = field(default=0.1, metadata={"doc": "relative to the mean of the Fisher's diagonal"})
    measurement: Literal["auto", "margin", "calibrated", "loss"] = field(
        default="auto",
        metadata={"doc": "what un-normalised influence is on; auto: margin of a classifier, loss of a language model"},
    )
    references: float = field(
        default=0.5, metadata={"doc": "share of a validation set kept aside as trusted references"}
    )


@dataclass(frozen=True, slots=True)
class Verdicts:
    """How scores become flags."""

    fdr: float = field(default=0.10, metadata={"doc": "false discovery rate of the flags of one batch"})
    pool: int = field(default=200, metadata={"doc": "a smaller batch is judged with earlier arrivals of its source"})
    valuable: float = field(default=0.20, metadata={"doc": "share of a batch that may be called valuable"})


@dataclass(frozen=True, slots=True)
class Schedule:
    """How often the daemon looks by itself, in seconds, and what it may leave for later."""

    stages: float = 2.0
    folders: float = 1.0
    upkeep: float = 15.0
    backfill: bool = field(
        default=True, metadata={"doc": "false: measure new arrivals only; old ones wait, as after a new checkpoint"}
    )


@dataclass(frozen=True, slots=True)
class Limits:
    """What a record, an example and a lease may cost."""

    record_bytes: int = 8_000_000
    nesting: int = 200
    quarantine_bytes: int = field(default=65_536, metadata={"doc": "of a refused record's raw bytes that are kept"})
    expansion: int = field(default=200, metadata={"doc": "a compressed file may grow this many times"})
    batch_records: int = field(default=5_000, metadata={"doc": "examples that are judged together"})
    lease_seconds: float = 60.0
    attempts: int = field(default=3, metadata={"doc": "deaths of a worker before a record is quarantined"})
    stall_seconds: float = field(
        default=60.0, metadata={"doc": "work that nobody takes for so long has its workers started again"}
    )
    turn_seconds: float = field(default=60.0, metadata={"doc": "how long one Celery message drains the table"})
    silence_seconds: float = field(
        default=15.0, metadata={"doc": "a database or broker that says nothing for so long is asked if it is there"}
    )
    disk_bytes: int = field(
        default=256 << 20, metadata={"doc": "nothing is taken in while the project's disk has less; 0: no limit"}
    )


@dataclass(frozen=True, slots=True)
class Retention:
    """How long what nobody needs any more is kept."""

    quarantine_days: float = field(
        default=90.0, metadata={"doc": "raw bytes of refused records; the line and the reason stay. 0: for ever"}
    )


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything curator was told, and by whom."""

    project: Path
    database: Database = Database()
    broker: Broker = Broker()
    workload: Workload = Workload()
    gradients: Gradients = Gradients()
    scores: Scores = Scores()
    verdicts: Verdicts = Verdicts()
    schedule: Schedule = Schedule()
    limits: Limits = Limits()
    retention: Retention = Retention()
    origins: Mapping[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        """Everything curator keeps on disk for this project."""
        return self.project / ".curator"

    def rows(self) -> Iterator[tuple[str, object, str]]:
        """Each setting with its value and where it came from; secrets are covered."""
        for section, key, spec in known():
            value = getattr(getattr(self, section), key)
            covered = "(set)" if spec.get("secret") and value else value
            yield f"{section}.{key}", covered, self.origins.get(f"{section}.{key}", "default")


SECTIONS: Mapping[str, type] = {
    name: hint for name, hint in get_type_hints(Settings).items() if name not in {"project", "origins"}
}


def known() -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Every (section, key, metadata) there is."""
    for section, cls in SECTIONS.items():
        for spec in fields(cls):
            yield section, spec.name, spec.metadata


def find_project(start: Path, environ: Mapping[str, str]) -> Path:
    """The directory of the nearest ``curator.toml``: ``CURATOR_PROJECT``, else upward from ``start``.

    Raises:
        NoProject: there is none.
    """
    if named := environ.get("CURATOR_PROJECT"):
        start = Path(named).parent if Path(named).name == FILE_NAME else Path(named)
        candidates = [start]
    else:
        candidates = [start, *start.resolve().parents]
    for directory in candidates:
        if (directory / FILE_NAME).is_file():
            return directory.resolve()
    raise NoProject(directory=start)


def load(
    project: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> Settings:
    """Settings of one project.

    Args:
        project: its directory; looked for from the working directory when None.
        environ: the environment; the process's own when None.
        flags: ``"section.key" -> value`` from the command line.

    Raises:
        NoProject: no curator.toml was found.
        BadToml: the file is not TOML.
        UnknownSetting: a section or key that does not exist, with the nearest that does.
        BadSetting: a value of the wrong type or out of range.
    """
    environ = os.environ if environ is None else environ
    if project is None:
        project = find_project(Path.cwd(), environ)
    elif not (project / FILE_NAME).is_file():
        raise NoProject(directory=project)
    values: dict[str, tuple[object, str]] = {}
    values.update(_from_toml(project / FILE_NAME))
    values.update(_from_environment(environ))
    values.update({key: (value, "flag") for key, value in (flags or {}).items() if value is not None})
    return _build(project.resolve(), values)


def _from_toml(path: Path) -> Iterator[tuple[str, tuple[object, str]]]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadToml(path=path, reason=error) from None
    for section, table in document.items():
        if section not in SECTIONS or not isinstance(table, dict):
            raise UnknownSetting(where=path.name, key=f"[{section}]", suggestion=_nearest(section, SECTIONS))
        keys = [spec.name for spec in fields(SECTIONS[section])]
        for key, value in table.items():
            if key not in keys:
                raise UnknownSetting(where=f"{path.name} [{section}]", key=key, suggestion=_nearest(key, keys))
            yield f"{section}.{key}", (value, path.name)


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, tuple[object, str]]]:
    _refuse_misspelt(environ)
    for section, key, _ in known():
        name = f"CURATOR_{section}_{key}".upper()
        if name in environ:
            yield f"{section}.{key}", (environ[name], name)
        elif f"{name}_FILE" in environ:
            path = Path(environ[f"{name}_FILE"])
            try:
                yield f"{section}.{key}", (path.read_text(encoding="utf-8").strip(), f"{name}_FILE")
            except OSError:
                raise BadSetting(
                    key=f"{section}.{key}", value=str(path), origin=f"{name}_FILE", expected="a readable file"
                ) from None


def _refuse_misspelt(environ: Mapping[str, str]) -> None:
    """A variable that begins like a setting and is none would be passed over in silence."""
    names = [f"CURATOR_{section}_{key}".upper() for section, key, _ in known()]
    for name in environ:
        plain = name.removesuffix("_FILE")
        begins = plain.startswith(tuple(f"CURATOR_{section}_".upper() for section in SECTIONS))
        if plain not in names and (begins or difflib.get_close_matches(plain, names, n=1, cutoff=0.9)):
            raise UnknownSetting(where="The environment", key=name, suggestion=_nearest(plain, names))


def _nearest(word: str, choices: typing.Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def _build(project: Path, values: Mapping[str, tuple[object, str]]) -> Settings:
    sections: dict[str, Any] = {}
    for section, cls in SECTIONS.items():
        hints = get_type_hints(cls)
        given = {
            key: _convert(f"{section}.{key}", hint, *values[f"{section}.{key}"])
            for key, hint in hints.items()
            if f"{section}.{key}" in values
        }
        sections[section] = replace(cls(), **given)
    origins = {key: origin for key, (_, origin) in values.items()}
    settings = Settings(project=project, origins=origins, **sections)
    _check_ranges(settings)
    return settings


def _convert(key: str, hint: Any, value: object, origin: str) -> object:
    """``value`` as the type of the setting; text, from the environment, is read as that type."""

    def bad(expected: str) -> BadSetting:
        return BadSetting(key=key, value=value, origin=origin, expected=expected)

    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise bad("one of " + ", ".join(map(repr, get_args(hint))))
        return value
    if get_origin(hint) is tuple:
        return _convert_names(value, bad)
    if hint is bool:
        return _convert_bool(value, bad)
    if hint in (int, float):
        return _convert_number(hint, value, bad)
    if hint is str and isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return types.MappingProxyType(dict(value))
    raise bad("a table" if hint is not str else "text")


def _convert_names(value: object, bad: typing.Callable[[str], BadSetting]) -> tuple[str, ...]:
    names = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise bad("a list of names")
    return tuple(names)


def _convert_bool(value: object, bad: typing.Callable[[str], BadSetting]) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise bad("true or false")


def _convert_number(
    hint: type[int] | type[float], value: object, bad: typing.Callable[[str], BadSetting]
) -> int | float:
    expected = "a whole number" if hint is int else "a number"
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise bad(expected)
    if hint is int and isinstance(value, float):
        raise bad(expected)
    try:
        return hint(value)
    except ValueError:
        raise bad(expected) from None


# (key, lowest, highest): the ranges a number may take; the lowest is allowed unless it is said to be open.
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("gradients.dimension", 8, 1_000_000),
    ("gradients.batch", 1, 100_000),
    ("scores.damping", 1e-6, 1e6),
    ("scores.references", 0.05, 0.95),
    ("verdicts.fdr", 1e-4, 0.5),
    ("verdicts.pool", 1, 1_000_000),
    ("verdicts.valuable", 0, 1),
    ("schedule.stages", 0.1, 86_400),
    ("schedule.folders", 0.1, 86_400),
    ("schedule.upkeep", 0.1, 86_400),
    ("limits.record_bytes", 1, 1 << 30),
    ("limits.batch_records", 1, 1_000_000),
    ("limits.lease_seconds", 1, 86_400),
    ("limits.attempts", 1, 100),
    ("limits.stall_seconds", 2, 86_400),
    ("limits.nesting", 1, 900),
    ("limits.quarantine_bytes", 0, 1 << 30),
    ("limits.expansion", 1, 1_000_000),
    ("limits.turn_seconds", 1, 86_400),
    ("limits.silence_seconds", 0.1, 86_400),
    ("limits.disk_bytes", 0, 1 << 50),
    ("retention.quarantine_days", 0, 36_500),
)


def _check_ranges(settings: Settings) -> None:
    for key, lowest, highest in _RANGES:
        section, name = key.split(".")
        value = getattr(getattr(settings, section), name)
        if not lowest <= value <= highest:
            origin = settings.origins.get(key, "default")
            raise BadSetting(key=key, value=value, origin=origin, expected=f"between {lowest:g} and {highest:g}")
