"""The same LDS task through the published peers, each in an environment of its own, made and deleted here.

python -m tests.benchmarks.peers [--peer "traker 0.3.2"] [--model MLP] [--stage overconfident] [--keep DIR]

Needs a package index and about 2 GB of temporary space; with --keep, environments are made in that folder, or found
there, and stay. Scores of every mode are judged by the same subsets and
queries as curator's; results/peers.json and peers.md. What fails is reported with its last line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.benchmarks import quality
from tests.benchmarks.machine import described
from tests.benchmarks.peers import curator_
from tests.benchmarks.peers.environments import Peer, installed, last_line
from tests.benchmarks.quality_study import Judge

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"

PEERS = {
    "bergson 2.5.1": Peer("bergson_", ("bergson==2.5.1",), removed=("torchvision", "torchaudio")),
    "dattri 0.3.0": Peer("dattri_", ("dattri==0.3.0",)),
    "dattri-llm 0.1.0": Peer("dattri_llm_", ("dattri-llm[transformers]==0.1.0", "dattri==0.3.0")),
    "kronfluence 1.0.1": Peer("kronfluence_", ("kronfluence==1.0.1",)),
    # Told to ignore what Pythons a package asks for, pip would take a numpy that this Python cannot build.
    "logix-ai 0.1.1": Peer("logix_", ("logix-ai==0.1.1", "numpy==2.4.6"), options=("--ignore-requires-python",)),
    "traker 0.3.2": Peer("traker_", ("traker==0.3.2",)),
}


def export(scene: quality.Scene, path: Path) -> None:
    """The job, as ``job.Job`` reads it."""
    d = scene.data
    arrays = {f"w/{n}": w.numpy() for n, w in scene.truth.weights.items()}
    arrays |= {f"{p}/{k}": t.numpy() for p in ("scored", "queries") for k, t in zip("xy", getattr(d, p), strict=True)}
    np.savez(path, model=scene.name, **arrays)


def attempt(peer: Peer, scenes: list[quality.Scene], minutes: float, keep: Path | None) -> list[dict[str, Any]]:
    """Each job through one peer: the modes that were written, and how the driver ended."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            python = installed(peer, (keep or folder) / peer.driver)
        except subprocess.CalledProcessError as error:
            return [{"ended": last_line(error.stderr), "modes": {}} for _ in scenes]
        return [_driven(peer, python, scene, folder / f"{i}", minutes) for i, scene in enumerate(scenes)]


def _driven(peer: Peer, python: Path, scene: quality.Scene, folder: Path, minutes: float) -> dict[str, Any]:
    out = folder / "out"
    out.mkdir(parents=True)
    export(scene, folder / "job.npz")
    environment = os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "OMP_NUM_THREADS": "1"}
    command = [python, HERE / f"{peer.driver}.py", folder / "job.npz", out]
    began = time.monotonic()
    try:
        ran = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60 * minutes, check=False
        )
        ended = "" if ran.returncode == 0 else last_line(ran.stderr)
    except subprocess.TimeoutExpired:
        ended = f"stopped after {minutes:g} minutes"
    modes = {path.stem: _judged(path, scene) for path in sorted(out.glob("*.npy"), key=lambda p: p.stat().st_mtime)}
    return {"ended": ended, "seconds": round(time.monotonic() - began, 1), "modes": modes}


def _judged(path: Path, scene: quality.Scene) -> dict[str, Any]:
    numbers, seconds = path.with_suffix(".txt").read_text(encoding="utf-8").split()
    return judged(np.load(path), scene) | {"numbers": int(numbers), "seconds": float(seconds)}


def judged(score_NV: np.ndarray, scene: quality.Scene) -> dict[str, Any]:
    """Over the queries that choose no damping."""
    if not np.isfinite(score_NV).all():
        return {"lds": None}
    return Judge.figures(Judge(scene, None), score_NV)


# --- the page -----------------------------------------------------------------------------------------------


def page(found: dict[str, Any]) -> str:
    parts = [described(__doc__), EXPLAINED]
    for scene, peers in found.items():
        parts += [f"## {scene}\n", "| tool, mode | bytes an example | LDS | seconds |", "|---|---|---|---|"]
        for peer, run in peers.items():
            parts += [_line(peer, mode, row) for mode, row in run["modes"].items()]
            parts += [f"| {peer} | | ended: {run['ended']} | |"] if run["ended"] else []
        parts.append("")
    return "\n".join(parts)


EXPLAINED = """Same checkpoint, scored examples, queries, subsets and outcomes for all; LDS of the same 200 queries (for
the transformer 100) with its bootstrap interval. Peers fit their curvature on the scored examples themselves, as their
interfaces have it; curator is given both ways. Bytes are half precision, as of every recipe here; where there are none,
the method stores no example. Modes are those of the peers' own documentation, at the dampings named: none is tuned.
Seconds are of the whole mode, on one busy core, and compare nothing.
"""


def _line(peer: str, mode: str, row: dict[str, Any]) -> str:
    size = f"{2 * row['numbers'] + 4:,}" if row["numbers"] else ""
    if row["lds"] is None:
        return f"| {peer}: {mode} | {size} | not finite | {row['seconds']} |"
    value, low, high = row["lds"]
    return f"| {peer}: {mode} | {size} | {value:.3f} ({low:.2f}-{high:.2f}) | {row['seconds']} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", action="append", choices=["curator", *PEERS])
    parser.add_argument("--model", action="append", choices=["MLP", "transformer"])
    parser.add_argument("--stage", action="append", choices=quality.STAGES)
    parser.add_argument("--minutes", type=float, default=5, help="for one peer and job")
    parser.add_argument("--keep", type=Path, help="where environments stay")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "peers.json"
    models, stages = asked.model or ["MLP", "transformer"], asked.stage or ["overconfident"]
    scenes = [
        quality.scene(model, quality.STAGES.index(stage), gradients_too=False) for model in models for stage in stages
    ]
    for name in asked.peer or ["curator", *PEERS]:
        runs = curator_.runs(scenes) if name == "curator" else attempt(PEERS[name], scenes, asked.minutes, asked.keep)
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for scene, run in zip(scenes, runs, strict=True):
            found.setdefault(f"{scene.name}, {quality.STAGES[scene.stage]}", {})[name] = run
            print(name, scene.name, run["ended"], {m: r["lds"] for m, r in run["modes"].items()}, flush=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (RESULTS / "peers.md").write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
