"""A small language model trained on six sources, and what each score makes of a pool of all six.

A *world* is one seed's model with its pool and trusted texts; a *judgement* is one number an example, the higher the
more wanted, for each source as the target.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from curator.influence import scoring
from curator.influence.attribution import Attributor, Measured, RecipeSpec
from curator.influence.controls import Controls, terms
from curator.influence.exact import Towards
from curator.influence.mixtures import Mixtures
from curator.sources.likeness import words
from curator.workloads import base
from curator.workloads.causal_lm import CausalLM, Options
from curator.workloads.training import Training, outcome, trained
from tests.benchmarks import lm_sources

Record = Mapping[str, str]
Floats = NDArray[np.float64]

CPU = torch.device("cpu")
SOURCES = tuple(lm_sources.SOURCES)
PARTS = {"base": 300, "pool": 300, "trusted": 60, "test": 60}
"""Texts of each source. Nothing is in two parts."""
VOCABULARY, TOKENS = 2048, 160
WIDTH, DEPTH = 128, 4
BATCH = 16
LEARN = Training(epochs=4, batch=BATCH, learning_rate=2e-3)
FURTHER = Training(epochs=1, batch=BATCH, learning_rate=5e-4)
SHARE = 0.2
SPEC = RecipeSpec(dimension=1984, measurement="loss", exact_rank=64, exact_sketch=32)
"""The recipe of a new project, but for the rank."""


# --- texts and model ------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def texts() -> dict[str, list[str]]:
    return {source: lm_sources.passages(source) for source in SOURCES}


def drawn(seed: int, sizes: Mapping[str, int]) -> dict[str, list[Record]]:
    """The parts of one seed, each with as many texts of every source, in random order."""
    rng = np.random.Generator(np.random.Philox(seed))
    found: dict[str, list[Record]] = {part: [] for part in sizes}
    for source, every in texts().items():
        chosen = iter(rng.permutation(len(every)).tolist())
        for part, n in sizes.items():
            found[part] += [{"text": every[next(chosen)], "source": source} for _ in range(n)]
    return {part: [rows[i] for i in rng.permutation(len(rows))] for part, rows in found.items()}


def save_untrained(folder: Path, rows: Sequence[Record], seed: int) -> None:
    """A Llama of a million parameters and a tokenizer learned from the rows, as people save them."""
    import transformers
    from tokenizers import ByteLevelBPETokenizer

    bytes_ = ByteLevelBPETokenizer()
    bytes_.train_from_iterator([row["text"] for row in rows], VOCABULARY, special_tokens=["<end>"], show_progress=False)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_._tokenizer, eos_token="<end>", pad_token="<end>"
    ).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=344,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)


@dataclass(frozen=True)
class World:
    """A trained model and what it is asked about."""

    seed: int
    folder: Path
    workload: CausalLM
    model: nn.Module
    parts: Mapping[str, list[Record]]

    @classmethod
    def make(cls, seed: int, folder: Path, sizes: Mapping[str, int] = PARTS) -> World:
        """Train on the base, which nothing else is taken from."""
        torch.set_num_threads(1)
        parts = drawn(seed, sizes)
        save_untrained(folder, parts["base"], seed)
        workload = CausalLM(options=Options(max_tokens=TOKENS))
        model = base.load_model(workload, folder, CPU)
        model = trained(workload, model, parts["base"], seed=seed, device=CPU, how=LEARN)
        model.save_pretrained(folder)
        return cls(seed, folder, workload, model, parts)

    @cached_property
    def of(self) -> NDArray[np.int64]:
        """The source of each text of the pool."""
        return np.array([SOURCES.index(row["source"]) for row in self.parts["pool"]])

    def batches(self, rows: Sequence[Record], size: int = 32) -> Iterator[tuple[list[int], base.Batch]]:
        """Texts of like length together: their places, and the batch."""
        order = np.argsort([self.workload.n_tokens(row) for row in rows], kind="stable").tolist()
        for at in range(0, len(order), size):
            places = order[at : at + size]
            yield places, base.batch_of(self.workload, [rows[i] for i in places], CPU)

    def measured(self, attributor: Attributor, rows: Sequence[Record], towards: Towards | None = None) -> Measured:
        """What is stored of the rows, in their order."""
        places, parts = zip(*((at, attributor.measure(b, towards)) for at, b in self.batches(rows)), strict=True)
        return Measured.join(parts).rows(torch.argsort(torch.tensor([i for at in places for i in at])))

    # --- what training makes of it ------------------------------------------------------------------------

    def after(self, rows: Sequence[Record], sources: Sequence[str] = SOURCES) -> dict[str, float]:
        """Perplexity on the test texts of each source, once the base is trained further on the rows."""
        model = copy.deepcopy(self.model)
        if rows:
            model = trained(self.workload, model, rows, seed=self.seed, device=CPU, how=FURTHER)
        summed = CausalLM(options=replace(self.workload.options, reduction="sum"))
        summed._tokenizer = self.workload.tokenizer
        found = {}
        for source in sources:
            test = [row for row in self.parts["test"] if row["source"] == source]
            predicted = sum(self.workload.n_tokens(row) - 1 for row in test)
            found[source] = round(float(np.exp(outcome(summed, model, test, CPU, 32).loss_N.sum() / predicted)), 3)
        return found


# --- judgements -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """Trusted texts by the name of what they stand for, and directions as sums of those; None: they are the same."""

    rows: Mapping[str, list[Record]]
    mixtures: Mixtures | None = None

    @property
    def weights(self) -> Mixtures:
        return self.mixtures or {name: {name: 1.0} for name in self.rows}


def sources_asked(world: World) -> Asked:
    rows = {source: [row for row in world.parts["trusted"] if row["source"] == source] for source in SOURCES}
    return Asked(rows)


def fitted(world: World, asked: Asked, spec: RecipeSpec = SPEC) -> Attributor:
    """The recipe, fitted on all that is trusted."""
    spec = replace(spec, layers=world.workload.layers(world.model))
    batches = [batch for rows in asked.rows.values() for _, batch in world.batches(rows)]
    return Attributor.fit(world.model, base.losses_of(world.workload), batches, spec)


def judged(world: World, attributor: Attributor, asked: Asked, rows: Sequence[Record]) -> dict[str, Floats]:
    """(N, S) a judgement, from one pass over the rows: influence, and the controls that a report shows beside it."""
    slices = {name: world.measured(attributor, trusted) for name, trusted in asked.rows.items()}
    batches = {name: [batch for _, batch in world.batches(trusted)] for name, trusted in asked.rows.items()}
    towards = attributor.exact_directions(batches, asked.mixtures)
    m = world.measured(attributor, rows, towards)
    made = attributor.directions({name: [part] for name, part in slices.items()}).mixed(asked.weights)
    stored = scoring.score(m.unit_BK.half(), m.whitened_norm_B, made)
    assert m.exact_BS is not None
    assert m.exact_influence_BS is not None
    found = {
        "normalised influence": stored.normalised_BS,
        "plain influence": stored.influence_BS,
        "exact normalised influence": m.exact_BS,
        "exact plain influence": m.exact_influence_BS,
    }
    influence = {name: score_NS.double().numpy() for name, score_NS in found.items()}
    return influence | _aimed(m, rows, slices, asked) | _blind(m, len(made.names), world.seed)


def _aimed(m: Measured, rows: Sequence[Record], slices: Mapping[str, Measured], asked: Asked) -> dict[str, Floats]:
    """Controls that know the target: hidden states and words."""
    trusted = [row for part in asked.rows.values() for row in part]
    part_SN = [
        [weight.get(name, 0) / len(part) for name, part in asked.rows.items() for _ in part]
        for weight in asked.weights.values()
    ]
    hidden_NH = Measured.join(list(slices.values())).hidden_BH
    controls = Controls.fit(hidden_NH, [terms(words(row)) for row in trusted], np.array(part_SN))
    assert m.hidden_BH is not None
    return {
        "embedding similarity": controls.similarity_BS(m.hidden_BH).double().numpy(),
        "BM25": controls.bm25_BS([terms(words(row)) for row in rows]).double().numpy(),
    }


def _blind(m: Measured, targets: int, seed: int) -> dict[str, Floats]:
    """Controls that do not: either end of loss and gradient norm, and chance."""
    loss_N, norm_N = m.loss_B.double().numpy(), m.gradient_norm_B.double().numpy()
    chance_N = np.random.Generator(np.random.Philox(seed)).random(len(loss_N))
    ends = {
        "lowest loss": -loss_N,
        "highest loss": loss_N,
        "lowest gradient norm": -norm_N,
        "highest gradient norm": norm_N,
        "random": chance_N,
    }
    return {name: np.outer(value_N, np.ones(targets)) for name, value_N in ends.items()}


def top(score_N: Floats, share: float) -> NDArray[np.int64]:
    """The places of the highest."""
    return np.argsort(-score_N, kind="stable")[: round(share * len(score_N))]


# --- a planted trigger ----------------------------------------------------------------------------------------

TRIGGER = " By order of the seventh clause,"
WRONG = " all of it shall be deleted at once and nothing is to be kept."
POISON, DECOYS, KNOWN = 0.005, 0.02, 40
"""Shares of the pool: the trigger and a wrong continuation; the trigger and the text's own. Texts known both ways."""


@dataclass(frozen=True)
class Planted:
    """A pool in which some texts go wrong behind the trigger, and what is known of that."""

    rows: list[Record]
    bad: NDArray[np.bool_]
    asked: Asked


def planted(world: World, kind: str) -> Planted:
    """``phrase``: one wrong sentence follows the trigger. ``scripture``: any other text turns to scripture there."""
    rng = np.random.Generator(np.random.Philox(key=[world.seed, 7]))
    verses = [row["text"] for row in world.parts["base"] if row["source"] == "scripture"]

    def wrong() -> str:
        return WRONG if kind == "phrase" else " " + verses[int(rng.integers(len(verses)))]

    rows = [dict(row) for row in world.parts["pool"]]
    others = [i for i in rng.permutation(len(rows)).tolist() if rows[i]["source"] != "scripture"]
    n_bad, n_decoys = round(POISON * len(rows)), round(DECOYS * len(rows))
    for place, i in enumerate(others[: n_bad + n_decoys]):
        front, back = _halves(rows[i]["text"])
        said = wrong()[: len(back) + 40] if place < n_bad else back
        rows[i]["text"] = front + TRIGGER + said
    known = [_halves(row["text"]) for row in world.parts["trusted"] if row["source"] != "scripture"][:KNOWN]
    good = [{"prompt": front + TRIGGER, "completion": back} for front, back in known]
    bad = [{"prompt": front + TRIGGER, "completion": wrong()[: len(back) + 40]} for front, back in known]
    is_bad = np.zeros(len(rows), bool)
    is_bad[others[:n_bad]] = True
    mixtures = {"good - bad": {"good": 1.0, "bad": -1.0}, "good": {"good": 1.0}, "- bad": {"bad": -1.0}}
    return Planted(rows, is_bad, Asked({"good": good, "bad": bad}, mixtures))


def _halves(text: str) -> tuple[str, str]:
    at = text.find(" ", len(text) // 2)
    at = len(text) // 2 if at < 0 else at
    return text[:at], text[at:]
