"""The user's own model: ``factory = "my_module:build"``, imported from the project directory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from curator.errors import CuratorError, FactoryFailed, FactoryNotFound
from curator.workloads.base import Workload, checked, described


def build(*, project: Path, factory: str = "", **options: Any) -> Workload:
    """Call the user's factory with the options.

    Raises:
        FactoryNotFound: there is no such module or function.
        FactoryFailed: importing the module or calling the function raised; names file and line.
        WorkloadIncomplete: what it returned is no Workload.
    """
    make = _find(project, factory)
    try:
        workload = make(**options)
    except CuratorError:
        raise
    except Exception as error:
        raise FactoryFailed(factory=factory, where=described(error)) from error
    return checked(workload)


def _find(project: Path, factory: str) -> Callable[..., object]:
    module_name, _, attribute = factory.partition(":")
    if not module_name or not attribute:
        raise FactoryNotFound(factory=factory, project=project, reason="it is not written as module:function")
    make = getattr(_module(project, module_name, factory), attribute, None)
    if not callable(make):
        raise FactoryNotFound(factory=factory, project=project, reason=f"{module_name} has no function {attribute}")
    return make  # type: ignore[no-any-return]


def _module(project: Path, name: str, factory: str) -> object:
    if str(project) not in sys.path:
        # At the end: a project's file must not shadow an installed package that curator itself imports.
        sys.path.append(str(project))
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0] and error.name != name:
            raise FactoryFailed(factory=factory, where=described(error)) from error
        raise FactoryNotFound(factory=factory, project=project, reason=f"there is no module {name}") from error
    except Exception as error:
        raise FactoryFailed(factory=factory, where=described(error)) from error
