"""Verifications, as they are read: the arms with their figures, and what follows in words."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row

from curator.errors import NoSuchVerification
from curator.store import verifications
from curator.types import Arm

Rows = Sequence[Row[Any]]

CLAIMS = (Arm.KEPT, Arm.SELECTED)
"""The arms that are curator's."""


@dataclass(frozen=True, slots=True)
class Verification:
    """One verification: what was asked, its arms, and what they say."""

    verification: int
    state: str
    at: datetime.datetime
    checkpoint: str
    selection: str | None
    held_out: str | None
    seeds: int
    draws: int
    training: str | None
    finished: int
    runs: int
    detail: str | None
    arms: Rows = ()

    @property
    def facts(self) -> dict[str, object]:
        """All but the arms."""
        return {name: getattr(self, name) for name in _FACTS}

    @property
    def conclusions(self) -> tuple[str, ...]:
        """What follows, in words."""
        return tuple(conclusions(self.arms))

    @property
    def is_proved(self) -> bool:
        """Whether all that curator kept and selected is shown to be better than as much at random, by held-out loss."""
        low = [row.beside_random_low for row in self.arms if _is_claim(row) and row.measure == "loss"]
        return bool(low) and all(value is not None and value > 0 for value in low)


_FACTS = tuple(name for name in Verification.__dataclass_fields__ if name != "arms")


def show(connection: Connection, number: int | None = None) -> Verification:
    """A verification, the latest where ``number`` is None.

    Raises:
        NoSuchVerification: there is none.
    """
    found = next((row for row in verifications.listing(connection) if number in (None, row.verification)), None)
    if found is None:
        raise NoSuchVerification(which="" if number is None else f" {number}")
    facts = {name: getattr(found, name) for name in _FACTS}
    return Verification(**facts, arms=verifications.arms(connection, found.verification))


def latest(connection: Connection) -> Verification | None:
    """The latest that is done; None where none is."""
    done = [row.verification for row in verifications.listing(connection) if row.state == "done"]
    return show(connection, done[0]) if done else None


def _is_claim(row: Row[Any]) -> bool:
    return row.arm in CLAIMS and row.slice is None and row.held_out_effect is not None


def conclusions(arms: Rows) -> Iterator[str]:
    """A sentence for each of curator's arms and what it has to be better than, on all held-out examples together.

    Of single slices only where it is surely worse than random: one of many may be so by chance.
    """
    for row in arms:
        if _is_claim(row):
            for other in _beside(row):
                yield _sentence(row, *other)
        elif row.arm in CLAIMS and row.beside_random_high is not None and row.beside_random_high < 0:
            yield f"slice {row.slice}: {_sentence(row, *next(_beside(row)))}"


def _beside(row: Row[Any]) -> Iterator[tuple[str, float, float, float]]:
    yield row.random_arm, row.beside_random, row.beside_random_low, row.beside_random_high
    yield "all", row.beside_all, row.beside_all_low, row.beside_all_high
    if row.beside_control is not None:
        yield f"the control {row.control_arm}", row.beside_control, row.beside_control_low, row.beside_control_high
    yield "the untrained checkpoint", row.held_out_effect, row.held_out_low, row.held_out_high


def _sentence(row: Row[Any], other: str, effect: float, low: float, high: float) -> str:
    word = "better than" if low > 0 else "WORSE than" if high < 0 else "NOT SHOWN to be better than"
    return f"{row.arm} is {word} {other}: held-out {row.measure} better by {effect:+.3g} ({low:+.3g} to {high:+.3g})"
