"""What stands in the way: of the work, and of there being any flag."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sqlalchemy import Connection, Row

from curator.influence.confidence import references_needed, smallest_share
from curator.settings import Policy
from curator.store import figures, reads, work
from curator.views.text import counted


def missing(footing: Row[Any]) -> Iterator[str]:
    """What there is to measure with, as far as it is not there."""
    if footing.checkpoint is None:
        yield "no checkpoint is in use: `curator checkpoint add NAME PATH`"
    if footing.validation_sets is None:
        yield "no validation set is in use: `curator validation add NAME FILE`"
    if footing.directions_state == "failed":
        yield f"the directions could not be computed: {footing.detail}"


def blocked(connection: Connection) -> Iterator[str]:
    """An error stays with its work until that is tried again, mended or not: so it is said when it was met."""
    if found := work.blocked(connection):
        ago = "" if found.seconds is None else f", {found.seconds:.0f} s ago"
        yield f"work waits until this is mended (met at the last attempt{ago}; the next one looks again): {found.error}"


def unflagged(connection: Connection, policies: Mapping[str, Policy]) -> Iterator[str]:
    """Why nothing is flagged, as far as it is not that nothing harms: what is missing, not done, or out of reach."""
    footing, totals = reads.footing(connection), reads.totals(connection)
    yield from missing(footing)
    yield from blocked(connection)
    if not totals.examples:
        yield "nothing has arrived: `curator ingest FILE`, or `curator watch FOLDER`"
    elif not totals.scored:
        yield f"none of {counted(totals.examples, 'example')} is scored yet: `curator status` says where they are"
    if slices := figures.slices(connection):
        yield from _out_of_reach(footing.trusted, len(slices), policies)


def _out_of_reach(references: int, slices: int, policies: Mapping[str, Policy]) -> Iterator[str]:
    """Of the policy that asks least of the references; nothing where one needs none."""
    flagging = [policy for policy in policies.values() if policy.kind != "valuable"]
    if not flagging:
        yield "no policy that flags is enabled: docs/policies.md"
    elif not any(policy.kind == "duplicate" or policy.score == "influence" for policy in flagging):
        looks = {policy: 1 if policy.kind == "outlier" else len(policy.slices) or slices for policy in flagging}
        most = max(flagging, key=lambda policy: policy.fdr / looks[policy])
        yield reach(references, most.fdr, looks[most])


def reach(references: int, fdr: float, slices: int) -> str:
    """What flags need, or that there can be none: each slice is looked at, so each has its part of ``fdr``."""
    share = smallest_share(references, fdr / slices)
    if share > 1:
        return (
            f"{counted(references, 'reference is', 'references are')} too few to flag anything at fdr {fdr:g}"
            f" on {counted(slices, 'slice')}: at least {references_needed(fdr / slices)} are needed, so add trusted"
            " examples"
        )
    return (
        f"with {counted(references, 'reference')} and {counted(slices, 'slice')}, flags at fdr {fdr:g} need"
        f" {share:.1%} of a batch to look worse than all of them"
    )
