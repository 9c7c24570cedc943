"""Where and when a result was measured: a figure without this is hearsay."""

from __future__ import annotations

import datetime
import os
import platform

import numpy as np
import torch

import curator


def described(doc: str) -> str:
    """Title, command and machine, for the top of a results file."""
    lines = [line.strip() for line in doc.strip().splitlines()]
    command = next(line for line in lines if line.startswith("python -m"))
    today = datetime.date.today().isoformat()
    where = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    versions = f"torch {torch.__version__}, numpy {np.__version__}, curator {curator.__version__}"
    return f"# {lines[0]}\n\n{today}; {where}, {versions}.\nCommand: `{command}`\n"
