"""Which workloads there are. Importing this imports no torch; building one does."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curator.errors import BadWorkloadOption, UnknownWorkload

if TYPE_CHECKING:
    from curator.workloads.base import Workload

KINDS: Mapping[str, str] = {
    "causal-lm": "curator.workloads.causal_lm",
    "text-classifier": "curator.workloads.text_classifier",
    "torch": "curator.workloads.torch_factory",
}
"""Kind -> module with a function ``build(*, project, **options) -> Workload``."""


def build(kind: str, project: Path, options: Mapping[str, Any]) -> Workload:
    """The workload of a project.

    Args:
        kind: one of KINDS.
        project: the project directory, from which a user's factory is imported.
        options: the rest of [workload] in curator.toml.

    Raises:
        UnknownWorkload: the kind is none of KINDS.
        BadWorkloadOption: a built-in workload does not take one of the options.
        FactoryNotFound, FactoryFailed, WorkloadIncomplete: see ``torch_factory``.
    """
    if kind not in KINDS:
        raise UnknownWorkload(kind=kind, known=", ".join(KINDS))
    factory = import_module(KINDS[kind]).build
    try:
        workload: Workload = factory(project=project, **options)
    except TypeError as error:
        raise BadWorkloadOption(kind=kind, reason=error) from error
    return workload
