"""Tokens a second of measuring language-model examples, beside a plain training step and beside the peers.

python -m tests.benchmarks.lm_throughput [--model tiny] [--tokens 512] [--device cuda] [--peer ...] [--keep DIR]

The plain step is the forward and backward of training: all weights' gradients, no optimizer. Every tool is timed in
turn with it, in one process, on the same model and rows. Peers (CPU only) get environments of their own, which take a
package index; with --keep they stay in that folder. Without --peer none is run. Results: results/lm_throughput.json
and .md (lm_throughput_cuda on a GPU).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curator.influence.attribution import Attributor, RecipeSpec, draw_masks
from curator.influence.capture import Layer, find_layers
from curator.influence.curvature import Whitening
from curator.influence.dropout import columns
from curator.influence.exact import ExactDirections, LowRankDirections, Towards
from curator.influence.fitting import Fitted
from curator.influence.kronecker import WIDEST_FACTOR, KroneckerRoots
from curator.workloads import base
from curator.workloads.causal_lm import CausalLM, Options
from curator.workloads.tokens import TokenBatch
from tests.benchmarks import steps
from tests.benchmarks.machine import described
from tests.benchmarks.peers.environments import Peer, installed, last_line

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TRANSFORMERS = "transformers==5.24.0"
PEERS = {
    "bergson 2.5.1": Peer("lm_bergson", ("bergson==2.5.1", TRANSFORMERS), removed=("torchvision", "torchaudio")),
    "dattri 0.3.0": Peer("lm_dattri", ("dattri==0.3.0", TRANSFORMERS)),
    "dattri-llm 0.1.0": Peer("lm_dattri_llm", ("dattri-llm[transformers]==0.1.0", "dattri==0.3.0", TRANSFORMERS)),
    "logix-ai 0.1.1": Peer(
        "lm_logix", ("logix-ai==0.1.1", "numpy==2.4.6", TRANSFORMERS), options=("--ignore-requires-python",)
    ),
}


@dataclass(frozen=True)
class Shape:
    """A Llama from its configuration; ``tokens``: in a batch on the CPU and on a GPU."""

    width: int
    depth: int
    heads: int
    groups: int
    inner: int
    vocabulary: int
    tokens: tuple[int, int]


SHAPES = {
    "tiny": Shape(384, 6, 6, 6, 1024, 2048, (2048, 32768)),
    "GPT-2-small-sized": Shape(768, 12, 12, 12, 2048, 50257, (512, 16384)),
    "1B-sized": Shape(2048, 16, 32, 8, 8192, 128256, (512, 8192)),
}
DEFAULT_SPEC = RecipeSpec(dimension=1984, measurement="loss", exact_sketch=32)
"""Of a new project, while its directions are not too large."""
DEFAULT = "whole exact scores, norm estimated (the default)"
BARE = "no exact scores, norm estimated"
MODES = {
    DEFAULT: DEFAULT_SPEC,
    "exact scores of rank 64, norm estimated": replace(DEFAULT_SPEC, exact_rank=64),
    "exact scores of rank 32, norm estimated": replace(DEFAULT_SPEC, exact_rank=32),
    "exact scores and norm (the default of other kinds)": replace(DEFAULT_SPEC, exact_norm=True),
    "the same, lengths without a sketch": replace(DEFAULT_SPEC, exact_norm=True, exact_sketch=0),
    "no exact scores, exact norm": replace(DEFAULT_SPEC, exact=False, exact_norm=True),
    BARE: replace(DEFAULT_SPEC, exact=False),
}
PEERS_SIZE = 256
"""Numbers a layer that the peers store: ten times what the default has at GPT-2-small's size."""
AS_MANY = {f"{name}; {PEERS_SIZE} numbers a layer": MODES[name] for name in (DEFAULT, BARE)}
PLAIN, FLOOR, NONE = "plain forward + backward", "frozen weights, nothing captured", "none"


def model_of(shape: Shape, tokens: int, device: str) -> Any:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        max_position_embeddings=tokens,
        tie_word_embeddings=True,
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@dataclass(frozen=True)
class Job:
    """One model, its rows of tokens, and the workload that a project would use."""

    model: Any
    id_NT: Tensor
    batch: int
    device: str
    workload: CausalLM

    @classmethod
    def make(cls, shape: Shape, tokens: int, device: str, batches: int) -> Job:
        batch = max(shape.tokens[device == "cuda"] // tokens, 1)
        rng = np.random.Generator(np.random.Philox(0))
        id_NT = torch.from_numpy(rng.integers(0, shape.vocabulary, (batches * batch, tokens))).to(device)
        workload = CausalLM(options=Options(max_tokens=tokens))
        return cls(model_of(shape, tokens, device), id_NT, batch, device, workload)

    def batches(self) -> list[TokenBatch]:
        return [TokenBatch(id_BT, id_BT) for id_BT in self.id_NT.split(self.batch)]

    def steps(self) -> dict[str, steps.Step]:
        """The plain step, the least that any capture costs, and what curator does at each setting."""
        found = {PLAIN: self.plain, FLOOR: self.floor}
        found |= {name: self.measuring(spec) for name, spec in MODES.items()}
        return found | {name: self.measuring(spec, PEERS_SIZE) for name, spec in AS_MANY.items()}

    def plain(self) -> None:
        """As a trainer has it: the model's own loss."""
        for batch in self.batches():
            self.model.zero_grad(set_to_none=True)
            self.model(input_ids=batch.id_BT, labels=batch.target_BT, use_cache=False).loss.backward()

    def floor(self) -> None:
        """The same with frozen weights, down to the input embedding."""
        weights = [p.requires_grad_(False) for p in self.model.parameters()]
        embedding = self.model.get_input_embeddings()
        handle = embedding.register_forward_hook(lambda _m, _a, out: out.requires_grad_())
        try:
            for batch in self.batches():
                self.model(input_ids=batch.id_BT, labels=batch.target_BT, use_cache=False).loss.backward()
        finally:
            handle.remove()
            for weight in weights:
                weight.requires_grad_(True)

    def measuring(self, spec: RecipeSpec, numbers: int = 0) -> steps.Step:
        """With the recipe's dimension, or so many numbers a layer."""
        layers = find_layers(self.model, self.workload.layers(self.model))
        dimension = numbers * len(layers) or spec.dimension
        spec = replace(spec, layers=tuple(layer.name for layer in layers), dimension=dimension)
        fitted = unfitted(layers, spec, self.device, self.id_NT.shape[1])
        attributor = Attributor(self.model, base.losses_of(self.workload), spec, fitted)
        towards = directions(layers, spec, self.device) if spec.exact else None
        return lambda: [attributor.measure(batch, towards) for batch in self.batches()]


def unfitted(layers: tuple[Layer, ...], spec: RecipeSpec, device: str, positions: float) -> Fitted:
    """Matrices of the right shapes in place of curvature: what a pass costs does not depend on what is in them."""
    masks = draw_masks(layers, spec)
    whole = columns(masks)
    whitening = Whitening(whole, {name: torch.eye(c.stop - c.start) for name, c in whole.items()})

    def root(width: int) -> Tensor:
        return torch.eye(width, device=device) if width <= WIDEST_FACTOR else torch.ones(width, device=device)

    inputs, outputs = ({x.name: root(x.shape[side]) for x in layers} for side in (1, 0))
    roots = KroneckerRoots(inputs, outputs, positions={x.name: positions for x in layers})
    return Fitted(masks, whitening, roots if spec.exact else None, 1.0)


def directions(layers: tuple[Layer, ...], spec: RecipeSpec, device: str) -> Towards:
    """Of one slice."""
    if not spec.exact_rank:
        both = {layer.name: torch.full((2, 1, *layer.shape), 1e-3, device=device) for layer in layers}
        return ExactDirections(("all",), both)
    left, right = (
        {x.name: torch.full((x.shape[side], min(spec.exact_rank, x.shape[side])), 1e-3, device=device) for x in layers}
        for side in (0, 1)
    )
    core = {n: torch.ones(2, left[n].shape[1], right[n].shape[1], device=device) for n in left}
    whole = ExactDirections(("all",), {})
    return LowRankDirections(("all",), left, right, core, whole, torch.zeros(1), torch.zeros(1))


def own(job: Job, rounds: int, only: list[str]) -> dict[str, Any]:
    """Seconds and peak bytes of each step of curator's, all in turn, beside those of the plain step."""
    every = {name: step for name, step in job.steps().items() if name == PLAIN or not only or name in only}
    seconds = steps.timed(every, job.device, rounds)
    memory = {}
    for name, step in every.items():
        job.model.zero_grad(set_to_none=True)
        memory[name] = steps.peak(step, job.device)
    both = {"seconds": seconds, "memory": memory}
    return {
        name if name == PLAIN else f"curator: {name}": {
            part: {PLAIN: of[PLAIN], name: of[name]} for part, of in both.items()
        }
        for name in every
    }


def peers(job: Job, rounds: int, asked: list[str], keep: Path | None) -> Iterator[dict[str, Any]]:
    """The same of each peer, beside a plain step in its own process; or how it ended."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        job.model.save_pretrained(folder / "model")
        np.save(folder / "tokens.npy", job.id_NT.numpy())
        (folder / "job.json").write_text(json.dumps({"rounds": rounds, "batch": job.batch}), encoding="utf-8")
        for name in asked:
            run = _driven(PEERS[name], folder, keep or folder)
            yield {": ".join([name, *list(run.get("seconds", {}))[1:]]): run}


def _driven(peer: Peer, folder: Path, environments: Path) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE / 'peers'}", "OMP_NUM_THREADS": "1"}
    out = folder / f"{peer.driver}.json"
    try:
        python = installed(peer, environments / peer.driver)
        command = [python, HERE / "peers" / f"{peer.driver}.py", folder, out]
        subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200, check=True)
    except subprocess.CalledProcessError as error:
        return {"ended": last_line(error.stderr)}
    except subprocess.TimeoutExpired:
        return {"ended": "stopped after 20 minutes"}
    return json.loads(out.read_text(encoding="utf-8"))


# --- the page -----------------------------------------------------------------------------------------------


def rows_of(job: Mapping[str, Any]) -> list[str]:
    """A line a step: tokens a second, times the plain step of its own round, peak memory over it."""
    return [_line(who, run) for who, run in sorted(job["runs"].items(), key=_by_speed)]


def _by_speed(item: tuple[str, Mapping[str, Any]]) -> float:
    return -statistics.median(_ratios(item[1])) if "seconds" in item[1] else 0.0


def _ratios(run: Mapping[str, Any]) -> list[float]:
    """Of each round, how many times as fast as its plain step."""
    base, seconds = run["seconds"][PLAIN], list(run["seconds"].values())[-1]
    return [plain / own for plain, own in zip(base, seconds, strict=True)]


def _line(who: str, run: Mapping[str, Any]) -> str:
    if "ended" in run:
        return f"| {who} | ended: {run['ended']} | | | |"
    name, seconds = list(run["seconds"].items())[-1]
    ratios, memory = _ratios(run), run["memory"]
    speed = run["tokens"] / statistics.median(seconds)
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    peak = f"{memory[name] / 2**20:,.0f} MB, {memory[name] / memory[PLAIN]:.2f}"
    return f"| {who} | {speed:,.0f} | {spread} | {len(ratios)} | {peak} |"


EXPLAINED = """Tokens a second, to be compared within one run only; times as fast as the plain step of the same round,
median over rounds with lowest and highest; peak of live allocations above the model, and over the plain step's. On a
CPU: one thread, float32, the processor's time, as the machine had other work; on a GPU bfloat16 and the wall's. Llamas
from configuration with tied heads, random tokens, no padding; curator's steps are ``Attributor.measure``, results on
the CPU, at dimension 1,984 unless said otherwise, the peers' builds of 256 numbers a layer (21,504 at GPT-2-small's
size); the head is captured by none. Matrices of the right shapes stand in for curvature and for the directions of one
slice.
"""


def page(found: Mapping[str, Any]) -> str:
    parts = [described(__doc__ or ""), EXPLAINED]
    for title, job in found.items():
        parts += [f"## {title}\n"]
        head = ["| step | tokens/s | times plain | rounds | peak memory |", "|---|---|---|---|---|"]
        parts += [*head, *rows_of(job), ""]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=SHAPES)
    parser.add_argument("--tokens", action="append", type=int, help="of a row: 512, 2048")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=2, help="in a step")
    parser.add_argument(
        "--only", action="append", default=[], choices=[NONE, FLOOR, *MODES, *AS_MANY], help="of curator's steps"
    )
    parser.add_argument("--peer", action="append", default=[], choices=[*PEERS, "all"])
    parser.add_argument("--keep", type=Path, help="where environments stay")
    asked = parser.parse_args()
    torch.set_num_threads(1) if asked.device == "cpu" else None
    path = RESULTS / f"lm_throughput{'_cuda' if asked.device == 'cuda' else ''}.json"
    for name in asked.model or ["tiny"]:
        for tokens in asked.tokens or [512]:
            job = Job.make(SHAPES[name], tokens, asked.device, asked.batches)
            title = f"{name}, {job.batch} x {tokens} tokens a batch, {_where(asked.device)}"
            if asked.only != [NONE]:
                keep(path, title, job, own(job, asked.rounds, asked.only))
            chosen = list(PEERS) if "all" in asked.peer else asked.peer
            if chosen and asked.device == "cpu":
                for run in peers(job, asked.rounds, chosen, asked.keep):
                    keep(path, title, job, run)


def keep(path: Path, title: str, job: Job, runs: Mapping[str, Any]) -> None:
    """Add what was found, and write the page anew."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    tokens = {"tokens": job.id_NT.numel()}
    runs = {name: {**tokens, **run} for name, run in runs.items()}
    found[title] = {"runs": {**found.get(title, {}).get("runs", {}), **runs}}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(page(found), encoding="utf-8")
    print(title, *rows_of(found[title]), sep="\n", flush=True)


def _where(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


if __name__ == "__main__":
    main()
