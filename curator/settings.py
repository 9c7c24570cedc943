"""One frozen ``Settings``, built once and handed down.

Precedence: command-line flag, ``CURATOR_SECTION_KEY`` in the environment (or ``..._FILE``, a file that holds the
value), ``curator.toml``, default. The dataclasses below are the only list of settings there is: parsing, checking,
``config show`` and the did-you-mean all read it.
"""

from __future__ import annotations

import difflib
import os
import re
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

    @property
    def placing(self) -> Mapping[str, Any]:
        """The options that say where a model is, and nothing of what a gradient means; a user's own have no such."""
        known = () if self.kind == "torch" else ("device_map", "max_memory")
        return {name: value for name, value in self.options.items() if name in known}


@dataclass(frozen=True, slots=True)
class Sources:
    """What arrives, and how it is understood."""

    fields: Mapping[str, Any] = field(
        default_factory=dict, metadata={"doc": 'what records call curator\'s fields: {text = "body", label = "class"}'}
    )
    named: Mapping[str, Any] = field(
        default_factory=dict, metadata={"doc": "fields of one source: written as [sources.NAME], fields = {...}"}
    )
    urls: tuple[str, ...] = field(
        default=(), metadata={"doc": "prefixes that may be read: s3://bucket/folder; empty: no URL at all"}
    )
    url_options: Mapping[str, Any] = field(
        default_factory=dict, metadata={"doc": "keyword arguments of the fsspec file system, a table a scheme"}
    )
    still_seconds: float = field(
        default=1.0, metadata={"doc": "how long a file of a watched folder stands still before it is taken"}
    )
    similarity: float = field(
        default=0.8, metadata={"doc": "share of three-word sequences in common that makes a near-duplicate"}
    )

    def fields_of(self, source: str) -> Mapping[str, str]:
        """What the records of a source call curator's fields; nothing where they use its own names."""
        found: Mapping[str, str] = self.named.get(source, {}).get("fields", self.fields)
        return found


@dataclass(frozen=True, slots=True)
class Gradients:
    """How a gradient is compressed."""

    mask: Literal["coordinate", "neuron"] = "coordinate"
    dimension: int = field(default=1984, metadata={"doc": "entries the mask keeps of a gradient, over all layers"})
    kept: Mapping[str, int] = field(
        default_factory=dict, metadata={"doc": "entries of single layers, a table; they count towards dimension"}
    )
    importance: Literal["none", "rms"] = field(
        default="none", metadata={"doc": "rms: the mask keeps rather what carries the gradients of trusted data"}
    )
    budget: Literal["uniform", "energy"] = field(
        default="uniform", metadata={"doc": "how layers share dimension; energy: by their part of the gradient"}
    )
    code: Literal["none", "pca+sjlt", "pca", "sjlt"] = field(
        default="none", metadata={"doc": "what brings the kept entries down to code_dimension numbers"}
    )
    code_dimension: int = field(default=960, metadata={"doc": "numbers stored of an example, where there is a code"})
    layers: tuple[str, ...] = field(default=(), metadata={"doc": "name patterns; empty: every linear layer"})
    seed: int = 0
    exact: bool = field(default=True, metadata={"doc": "scores before the mask, on arrival"})
    exact_norm: bool | Literal["auto"] = field(
        default="auto",
        metadata={"doc": "norms of full gradients; false: estimated by the mask; auto: false for a language model"},
    )
    batch: int = field(default=256, metadata={"doc": "examples a forward pass, at most"})
    tokens: int = field(
        default=8192, metadata={"doc": "padded tokens a forward pass, at most; halved where memory runs out"}
    )
    device: str = field(
        default="auto", metadata={"doc": 'auto: every GPU, or the CPU; cuda: every GPU; cpu, cuda:1, "cuda:0,cuda:2"'}
    )
    workers: int = field(default=1, metadata={"doc": "processes a device that measure, each with a model of its own"})


@dataclass(frozen=True, slots=True)
class Scores:
    """How influence is computed."""

    damping: float = field(default=0.1, metadata={"doc": "relative to the mean of the Fisher's diagonal"})
    curvature: Literal["angular", "fisher"] = field(
        default="angular",
        metadata={"doc": "fisher: loud examples weigh more; exact scores rank better, find less harm"},
    )
    exact_curvature: Literal["kfac", "ekfac"] = field(
        default="kfac", metadata={"doc": "of exact scores; ekfac: one more pass over the trusted data"}
    )
    exact_rank: int | Literal["auto"] = field(
        default="auto",
        metadata={"doc": "rows and columns a layer of exact directions; 0: all; auto: all up to 2 GiB, else 64"},
    )
    exact_sketch: int = field(
        default=32,
        metadata={"doc": "products a side that exact scores' lengths are read off, in wide layers; 0: the whole"},
    )
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
    stream: Literal["off", "source", "all"] = field(
        default="off",
        metadata={"doc": "flag only what keeps fdr over all batches together too: those of a source, or of all"},
    )
    veto: tuple[str, ...] = field(
        default=(), metadata={"doc": '"set/slice": what significantly harms one of these is flagged, whatever it helps'}
    )


@dataclass(frozen=True, slots=True)
class Policy:
    """A rule that gives verdicts: a table ``[policy.NAME]``. One of the name of a built-in rule changes that rule."""

    kind: Literal["harmful", "outlier", "duplicate", "valuable"] = "harmful"
    score: Literal["harm", "influence"] = field(
        default="harm", metadata={"doc": 'kind = "harmful": by the combined harm, or by a negative influence alone'}
    )
    slices: tuple[str, ...] = field(default=(), metadata={"doc": '"set/slice" or "set"; empty: every slice'})
    fdr: float = field(default=0.0, metadata={"doc": "0: that of [verdicts]"})
    share: float = field(default=0.0, metadata={"doc": 'kind = "valuable": share of a batch; 0: that of [verdicts]'})
    enabled: bool = True


BUILT_IN: Mapping[str, Policy] = types.MappingProxyType(
    {"harmful": Policy(), "valuable": Policy(kind="valuable"), "veto": Policy(score="influence")}
)
"""What judges where no ``[policy.NAME]`` says otherwise; ``veto`` is on the slices of [verdicts] veto, if any."""


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
    sources: Sources = Sources()
    gradients: Gradients = Gradients()
    scores: Scores = Scores()
    verdicts: Verdicts = Verdicts()
    schedule: Schedule = Schedule()
    limits: Limits = Limits()
    retention: Retention = Retention()
    policy: Mapping[str, Policy] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        """Everything curator keeps on disk for this project."""
        return self.project / ".curator"

    def policies(self) -> Mapping[str, Policy]:
        """The policies in force by name, with what they take from [verdicts] filled in."""
        named = {**BUILT_IN, **self.policy}
        named["veto"] = replace(named["veto"], slices=named["veto"].slices or self.verdicts.veto)
        return {name: self._filled(each) for name, each in sorted(named.items()) if self._is_on(name, each)}

    def _is_on(self, name: str, policy: Policy) -> bool:
        return policy.enabled and (name != "veto" or bool(policy.slices))

    def _filled(self, policy: Policy) -> Policy:
        return replace(policy, fdr=policy.fdr or self.verdicts.fdr, share=policy.share or self.verdicts.valuable)

    def rows(self) -> Iterator[tuple[str, object, str]]:
        """Each setting with its value and where it came from; secrets are covered. Then the policies in force."""
        for section, key, spec in known():
            value = getattr(getattr(self, section), key)
            covered = "(set)" if spec.get("secret") and value else value
            yield f"{section}.{key}", covered, self.origins.get(f"{section}.{key}", "default")
        for name, policy in self.policies().items():
            for spec_ in fields(policy):
                key = f"policy.{name}.{spec_.name}"
                yield key, getattr(policy, spec_.name), self.origins.get(key, "default")


SECTIONS: Mapping[str, type] = {
    name: hint for name, hint in get_type_hints(Settings).items() if name not in {"project", "policy", "origins"}
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
    for name, table in _policies_of(path, document.pop("policy", {})):
        yield from _keys_of(path, f"policy.{name}", table, Policy)
    for section, table in document.items():
        if section not in SECTIONS or not isinstance(table, dict):
            raise UnknownSetting(where=path.name, key=f"[{section}]", suggestion=_nearest(section, SECTIONS))
        known_keys = [spec.name for spec in fields(SECTIONS[section])]
        table = _gathered(table, known_keys) if section == "sources" else table
        yield from _keys_of(path, section, table, SECTIONS[section])


def _keys_of(
    path: Path, section: str, table: Mapping[str, object], cls: type
) -> Iterator[tuple[str, tuple[object, str]]]:
    keys = [spec.name for spec in fields(cls)]
    for key, value in table.items():
        if key not in keys:
            elsewhere = [other for other, name, _ in known() if name == key]
            suggestion = f" It belongs in [{elsewhere[0]}]." if elsewhere else _nearest(key, keys)
            raise UnknownSetting(where=f"{path.name} [{section}]", key=key, suggestion=suggestion)
        yield f"{section}.{key}", (value, path.name)


def _policies_of(path: Path, tables: object) -> Iterator[tuple[str, Mapping[str, object]]]:
    """The tables [policy.NAME]. A name is part of every verdict, so it is a word."""
    if not isinstance(tables, dict):
        raise BadSetting(key="policy", value=tables, origin=path.name, expected="a table for each policy")
    for name, table in tables.items():
        if not isinstance(table, dict) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise BadSetting(key=f"policy.{name}", value=table, origin=path.name, expected="a table [policy.NAME]")
        yield name, table


def _gathered(table: Mapping[str, Any], keys: list[str]) -> dict[str, Any]:
    """``[sources]`` with its sub-tables, one a source, under the key ``named``."""
    named = {key: value for key, value in table.items() if key not in keys and isinstance(value, dict)}
    rest = {key: value for key, value in table.items() if key not in named}
    return {**rest, "named": {**named, **rest.get("named", {})}} if named else rest


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
    settings = Settings(project=project, origins=origins, policy=_policies(values), **sections)
    _check_ranges(settings)
    _check_fields(settings)
    return settings


def _policies(values: Mapping[str, tuple[object, str]]) -> Mapping[str, Policy]:
    """What ``[policy.NAME]`` says, over the built-in policy of that name where there is one."""
    hints = get_type_hints(Policy)
    given: dict[str, dict[str, Any]] = {}
    for key, (value, origin) in values.items():
        section, _, rest = key.partition(".")
        if section == "policy":
            name, _, setting = rest.partition(".")
            given.setdefault(name, {})[setting] = _convert(key, hints[setting], value, origin)
    return {name: replace(BUILT_IN.get(name, Policy()), **table) for name, table in given.items()}


def _convert(key: str, hint: Any, value: object, origin: str) -> object:
    """``value`` as the type of the setting; text, from the environment, is read as that type."""

    def bad(expected: str) -> BadSetting:
        return BadSetting(key=key, value=value, origin=origin, expected=expected)

    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise bad("one of " + ", ".join(map(repr, get_args(hint))))
        return value
    if get_origin(hint) in (typing.Union, types.UnionType):
        return _convert_or_word(key, hint, value, origin)
    if get_origin(hint) is tuple:
        return _convert_names(value, bad)
    if hint is bool:
        return _convert_bool(value, bad)
    if hint in (int, float):
        return _convert_number(hint, value, bad)
    if hint is str and isinstance(value, str):
        return value
    if get_origin(hint) is Mapping:
        return _convert_table(get_args(hint)[1], value, bad)
    raise bad("text")


def _convert_or_word(key: str, hint: Any, value: object, origin: str) -> object:
    other, words = get_args(hint)
    if value in get_args(words):
        return value
    try:
        return _convert(key, other, value, origin)
    except BadSetting as error:
        expected = " or ".join([str(error.facts["expected"]), *map(repr, get_args(words))])
        raise BadSetting(key=key, value=value, origin=origin, expected=expected) from None


def _convert_table(values: Any, table: object, bad: typing.Callable[[str], BadSetting]) -> Mapping[str, object]:
    if not isinstance(table, Mapping):
        raise bad("a table")
    if values is int and not all(type(number) is int and number > 0 for number in table.values()):
        raise bad("a table of whole numbers above 0")
    return types.MappingProxyType(dict(table))


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
    ("gradients.code_dimension", 1, 100_000),
    ("gradients.batch", 1, 100_000),
    ("gradients.workers", 1, 1_000),
    ("scores.exact_rank", 0, 100_000),
    ("scores.exact_sketch", 0, 100_000),
    ("scores.damping", 1e-6, 1e6),
    ("scores.references", 0.05, 0.95),
    ("verdicts.fdr", 1e-4, 0.5),
    ("verdicts.pool", 1, 1_000_000),
    ("verdicts.valuable", 0, 1),
    ("sources.still_seconds", 0, 86_400),
    ("sources.similarity", 0.7, 1),
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


def _check_fields(settings: Settings) -> None:
    """A mapping that is not one would be found out by the first record, in the middle of the night."""
    named = settings.sources.named
    for key, given in [("sources.fields", settings.sources.fields), *((f"sources.{k}", v) for k, v in named.items())]:
        table = given if key == "sources.fields" else given.get("fields") if set(given) == {"fields"} else None
        if not isinstance(table, Mapping) or not all(isinstance(path, str) and path for path in table.values()):
            origin = settings.origins.get("sources.fields" if key == "sources.fields" else "sources.named", "default")
            raise BadSetting(key=key, value=given, origin=origin, expected='a table fields = {text = "body"}')


def _check_ranges(settings: Settings) -> None:
    for name, policy in settings.policy.items():
        for key, lowest, highest in (("fdr", 1e-4, 0.5), ("share", 0, 1)):
            value, full = getattr(policy, key), f"policy.{name}.{key}"
            if value and not lowest <= value <= highest:
                origin = settings.origins[full]
                raise BadSetting(key=full, value=value, origin=origin, expected=f"between {lowest:g} and {highest:g}")
    for key, lowest, highest in _RANGES:
        section, name = key.split(".")
        value = getattr(getattr(settings, section), name)
        if value != "auto" and not lowest <= value <= highest:
            raise _bad(settings, key, value, f"between {lowest:g} and {highest:g}")
    _check_gradients(settings)


def _check_gradients(settings: Settings) -> None:
    """What can be seen to be wrong without the model; ``curator.stages.instrument`` checks the rest against it."""
    asked = settings.gradients
    if settings.origins.get("gradients.code_dimension") and asked.code_dimension > asked.dimension:
        expected = f"at most gradients.dimension = {asked.dimension}: a code is of what the mask keeps"
        raise _bad(settings, "gradients.code_dimension", asked.code_dimension, expected)
    if sum(asked.kept.values()) > asked.dimension:
        expected = f"within gradients.dimension = {asked.dimension}: it adds up to {sum(asked.kept.values())}"
        raise _bad(settings, "gradients.kept", dict(asked.kept), expected)


def _bad(settings: Settings, key: str, value: object, expected: str) -> BadSetting:
    return BadSetting(key=key, value=value, origin=settings.origins.get(key, "default"), expected=expected)
