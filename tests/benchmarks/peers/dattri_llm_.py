"""dattri-llm: exact factors with EK-FAC and K-FAC, their cosine, and a coordinate mask (dot and cosine)."""

import tempfile

import torch
from dattri_llm import (
    AttributionArguments,
    AttributionTask,
    EKFACAttributor,
    HookManagerConfig,
    KFACAttributor,
    TracInAttributor,
)
from job import Job
from torch.utils.data import Dataset

job = Job(positions=True)
LINEAR = [n for n, m in job.model().named_modules() if isinstance(m, torch.nn.Linear)]


class Named(Dataset):
    """Batches as dictionaries, and every example with a number: rows that are alike stay apart."""

    def __init__(self, rows, first):
        self.rows, self.first = rows, first

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        x, y = self.rows[i]
        return {"x": x, "y": y, "number": torch.tensor(self.first + i)}


def lost(model, batch):
    return job.losses(model, (batch["x"], batch["y"])).mean()


def by_row(merged):
    """Rows with one content have one score there, their sum; here each has its own."""
    found = {}
    first = [found.setdefault((x.numpy().tobytes(), y.numpy().tobytes()), len(found)) for x, y in job.scored]
    if len(merged) == len(first):
        return merged
    return merged[first] / torch.bincount(torch.tensor(first))[first][:, None]


def run(mode, kind, numbers=0, projection=None, **options):
    with tempfile.TemporaryDirectory() as folder:
        arguments = AttributionArguments(
            output_dir=folder, per_device_train_batch_size=50, per_device_eval_batch_size=50
        )
        attributor = kind(arguments, task=AttributionTask(lost, job.model()))
        hooks = HookManagerConfig(
            linear_io=[f"^{name}$".replace(".", r"\.") for name in LINEAR], projection_kwargs=projection
        )
        score = attributor.attribute(Named(job.scored, 0), Named(job.queries, 10**6), hook_config=hooks, **options)
        job.write(mode, by_row(score.agnostic_matrix()[1].cpu()), numbers)


for damping in (0.1, 1.0):
    for name, kind in (("EK-FAC", EKFACAttributor), ("K-FAC", KFACAttributor)):
        run(f"exact factors, {name}, c = {damping:g}", kind, damping=damping, relative_damping=True)
run("exact factors, cosine", TracInAttributor, normalized_grad=True)
for kept in (side * side for side in job.sides):
    mask = {"__default__": {"style": "mask", "proj_dim": kept}}
    for name, cosine in (("dot", False), ("cosine", True)):
        run(f"mask {kept}, {name}", TracInAttributor, kept * len(LINEAR), mask, normalized_grad=cosine)
