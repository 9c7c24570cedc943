"""curator: which of the data that just came in will help the next training run, and how do you know?"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from curator.client import Client

__version__ = "0.1.0"
__all__ = ["Client", "__version__"]


def __getattr__(name: str) -> object:
    """``curator.Client``, imported when it is asked for: `import curator` stays instant."""
    if name == "Client":
        # By its name, for who reads this package's imports too: every module imports it, and Client imports them.
        return import_module("curator.client").Client
    raise AttributeError(f"module 'curator' has no attribute {name!r}")
