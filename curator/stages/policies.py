"""The policies in force: which they are, and what each says of a batch. Torch-free.

A policy that flags gives every example a p-value; q-values and the stream are the same for all of them
(``stages.verdicts``). What each kind of p-value means:

* ``harmful`` by ``harm``: the rank of the harm among the trusted references (conformal);
* ``harmful`` by ``influence``: the normalised influence is not below zero, by its standard error. Whether trusted data
  harms the slice as well is not asked: a veto does not care;
* ``outlier``: the rank of the self-influence, how unusual the gradient is, among the trusted references;
* ``duplicate``: 0 of what is nearly the same as an earlier arrival, else 1: it was counted, and no chance is in it.

Over S slices it is S times the smallest (Bonferroni): one bad slice is enough, and looking at many must not make flags
cheaper.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Row

from curator.errors import UnknownPolicySlice
from curator.influence.confidence import conformal_p, normal_p
from curator.settings import Policy, Settings
from curator.store import offers, recipes, verdicts

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Columns:
    """The scores of B examples on S slices, in the order of the directions."""

    p_BS: Floats
    normalised_BS: Floats
    stderr_BS: Floats
    self_influence_B: Floats
    copy_B: NDArray[np.bool_]

    @classmethod
    def of(cls, rows: Sequence[Row[Any]]) -> Columns:
        """From rows of the store. A standard error that was not stored is unknown."""
        p_BS = np.array([row.p_value for row in rows], np.float64)
        stderr = [row.normalised_stderr or [np.nan] * len(row.p_value) for row in rows]
        return cls(
            p_BS,
            np.array([row.normalised for row in rows], np.float64),
            np.array(stderr, np.float64).reshape(p_BS.shape),
            np.array([row.self_influence for row in rows], np.float64),
            np.array([row.of_id is not None for row in rows], bool),
        )

    def __len__(self) -> int:
        """How many examples."""
        return len(self.self_influence_B)


def version(policy: Policy) -> str:
    """Short digest of what a policy says: the same words, the same version."""
    return _digest(asdict(policy)).hex()[:8]


def adopt(connection: Connection, settings: Settings) -> int:
    """Judge by the settings' policies; where they have changed, everything is offered to be judged again."""
    policies = {name: asdict(policy) for name, policy in settings.policies().items()}
    said = {"policies": policies, "stream": settings.verdicts.stream, "pool": settings.verdicts.pool}
    digest = _digest(said)
    known = verdicts.policies_in_use(connection)
    if known is not None and bytes(known.digest) == digest:
        return int(known.id)
    number = verdicts.use_policies(connection, digest, json.dumps(said))
    recipe = recipes.recipe_in_use(connection)
    if known is not None and recipe is not None and recipe.state == "ready":
        offers.verdicts(connection, recipe.id)
    return number


def _digest(said: Mapping[str, Any]) -> bytes:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).digest()


def positions(name: str, policy: Policy, slices: Sequence[str]) -> list[int]:
    """Where the slices of a policy are among ``slices`` ("set/slice", in the order of the directions).

    Raises:
        UnknownPolicySlice: there is none of a name it gives.
    """
    found: list[int] = []
    for wanted in policy.slices:
        matching = [at for at, known in enumerate(slices) if wanted in (known, known.partition("/")[0])]
        if not matching:
            raise UnknownPolicySlice(policy=name, slice=wanted, known=", ".join(slices))
        found += matching
    return sorted(set(found)) if policy.slices else list(range(len(slices)))


def p_values(policy: Policy, at: Sequence[int], of: Columns, references: Sequence[Row[Any]]) -> tuple[Floats, Floats]:
    """p-values of B examples under a policy that flags, and the position of the slice that decided; (B,), (B,)."""
    if policy.kind == "outlier":
        known = [row.self_influence for row in references]
        return conformal_p(of.self_influence_B, known), np.full(len(of), at[0], np.float64)
    if policy.kind == "duplicate":
        return np.where(of.copy_B, 0.0, 1.0), np.full(len(of), at[0], np.float64)
    p_BS = normal_p(of.normalised_BS, of.stderr_BS) if policy.score == "influence" else of.p_BS
    chosen = p_BS[:, list(at)]
    return np.minimum(1.0, chosen.min(axis=1) * len(at)), np.asarray(at, np.float64)[chosen.argmin(axis=1)]


def most_valuable(policy: Policy, at: Sequence[int], of: Columns, flagged_B: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The best share of a batch by normalised influence on its weakest slice, among the unflagged above zero; (B,)."""
    weakest_B = of.normalised_BS[:, list(at)].min(axis=1)
    order = [row for row in np.argsort(-weakest_B, kind="stable") if weakest_B[row] > 0 and not flagged_B[row]]
    chosen_B = np.zeros(len(of), bool)
    chosen_B[order[: int(len(of) * policy.share)]] = True
    return chosen_B
