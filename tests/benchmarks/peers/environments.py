"""Environments of the peers: each in one of its own, made from the package index, so that none decides for another."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Peer:
    """What is installed beside torch, with which options, and what has to go again."""

    driver: str
    packages: tuple[str, ...]
    options: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


def installed(peer: Peer, folder: Path) -> Path:
    """An environment with the peer in it, unless it is there; its interpreter."""
    python = folder / "bin" / "python"
    if python.exists():
        return python
    making = folder.with_name(folder.name + ".part")
    shutil.rmtree(making, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", making], check=True)
    pip = [making / "bin" / "python", "-m", "pip", "-q", "--disable-pip-version-check"]
    # One command: a package that asks for torchvision would otherwise bring another torch.
    wanted = ["install", "--no-compile", *peer.options, TORCH, *peer.packages]
    subprocess.run([*pip, *wanted], check=True, capture_output=True, text=True)
    if peer.removed:
        subprocess.run([*pip, "uninstall", "-y", *peer.removed], check=True, capture_output=True, text=True)
    making.rename(folder)
    return python


def last_line(text: str) -> str:
    """What a process that failed said last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"
