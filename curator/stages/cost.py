"""What measuring an example costs here, from a sample that is measured: nothing of it is stored."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from curator.influence.attribution import Attributor, RecipeSpec
from curator.stages.instrument import Instrument
from curator.workloads import base

VECTOR_OVERHEAD = 1.05
"""Of the bytes of a stored vector: rows of 960, 1984 or 3968 numbers fill their pages to 1.04-1.10."""
ROW_BYTES = 2_800
"""An example's facts, scores, work and indexes beside its record and vector: 2,755 measured on 5,000 digits."""
WARM = 4


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one example, on average over the sample.

    ``cut`` is the share that is longer than the limit; ``flops`` counts matrix products; bytes are of the database.
    """

    device: str
    sample: int
    tokens: float
    longest: int
    cut: float
    seconds: float
    flops: float
    vector_bytes: float
    record_bytes: float

    @property
    def bytes(self) -> float:
        """All an example takes in the database."""
        return self.vector_bytes + self.record_bytes + ROW_BYTES


def of_sample(tools: Instrument, records: Sequence[Mapping[str, Any]], record_bytes: float) -> Cost:
    """Measure the records as arrivals are measured; a recipe that is not fitted yet is fitted on them for the while.

    Raises:
        CuratorError: whatever stands in the way of measuring, with its fix.
    """
    fitted = tools.attributor or _fitted(tools, records)
    ready = replace(tools, attributor=fitted)
    ready.measure(records[:WARM])
    started = time.perf_counter()
    ready.measure(records)
    seconds = time.perf_counter() - started
    with FlopCounterMode(display=False) as counter:
        ready.measure(records)
    width = fitted.K if tools.spec.code == "none" else tools.spec.code_dimension
    lengths = [base.n_tokens_of(tools.workload, record) for record in records]
    return Cost(
        device=str(tools.device),
        sample=len(records),
        tokens=mean(lengths),
        longest=max(lengths),
        cut=mean(base.n_cut_of(tools.workload, record) > 0 for record in records),
        seconds=seconds / len(records),
        flops=counter.get_total_flops() / len(records),
        vector_bytes=2 * width * VECTOR_OVERHEAD,
        record_bytes=record_bytes,
    )


def passes_over_trusted(roles: Mapping[str, int], spec: RecipeSpec) -> int:
    """Examples that pass through the model before the first arrival can: at least, as a code or a wide mask takes more.

    Curvature is fitted on what is behind directions; every trusted example is measured, what faults are rehearsed on
    once more with a fault; exact directions take two further passes.
    """
    behind, against = roles.get("direction", 0), roles.get("contrast", 0)
    exact = 2 * (behind + against) if spec.exact else 0
    return sum(roles.values()) + behind + roles.get("rehearsal", 0) + exact


def _fitted(tools: Instrument, records: Sequence[Mapping[str, Any]]) -> Attributor:
    """Without a code: a sample is too small for one, and what it adds to a pass is one product."""
    spec = replace(tools.spec, code="none", code_dimension=0)
    return Attributor.fit(tools.model, base.losses_of(tools.workload), list(tools.batches(records)), spec)
