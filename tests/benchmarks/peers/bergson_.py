"""bergson: random projection of each module, autocorrelation Hessian; one-sided, and two-sided with unit norm."""

import tempfile

import torch
from bergson.collector.in_memory_collector import InMemoryCollector
from bergson.config import InversionConfig
from bergson.config.config import IndexConfig
from bergson.gradients import GradientProcessor
from bergson.hessians.preconditioner import DensePreconditioner
from datasets import Dataset
from job import Job

# Its hooks take inputs of shape (N, S, I) only.
job = Job(positions=True)


class Held(torch.nn.Module):
    """A model that knows its device, as bergson asks."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.device = inner, torch.device("cpu")

    def forward(self, x):
        return self.inner(x)


def collect(rows, processor, folder, fit):
    model = Held(job.model())
    # A gradient of the first layer's input makes its backward hooks run.
    data = Dataset.from_dict({"input_ids": [[0]] * len(rows), "length": [1] * len(rows)})
    collector = InMemoryCollector(
        model=model, processor=processor, data=data, cfg=IndexConfig(run_path=folder), skip_hessians=not fit
    )
    for at in range(0, len(rows), 50):
        x, y = rows[at : at + 50]
        x = x.requires_grad_() if x.is_floating_point() else x
        with collector.with_batch(None):
            lost = job.losses(model, (x, y))
            lost.sum().backward()
        collector.process_batch(list(range(at, at + len(x))), losses=lost)
    collector.teardown()
    return {name: g.float() for name, g in collector.gradients.items()}


def joined(grads, unit):
    whole = torch.cat(list(grads.values()), dim=1)
    return whole / whole.norm(dim=1, keepdim=True).clamp_min(1e-30) if unit else whole


for side in job.sides:
    with tempfile.TemporaryDirectory() as folder:
        processor = GradientProcessor(projection_dim=side)
        z = collect(job.scored, processor, folder, True)
        v = collect(job.queries, processor, folder, False)
        numbers = sum(g.shape[1] for g in z.values())
        for damping in (0.1, 1.0, 10.0):
            chosen = InversionConfig(damping_factor=damping)
            whole, half = (
                DensePreconditioner.from_processor(processor, inversion_cfg=chosen, power=p) for p in (-1.0, -0.5)
            )
            one = joined(z, False) @ joined(whole.apply(v), False).T
            two = joined(half.apply(z), True) @ joined(half.apply(v), True).T
            job.write(f"{side} x {side}, one-sided, c = {damping:g}", one, numbers)
            job.write(f"{side} x {side}, two-sided, unit norm, c = {damping:g}", two, numbers)
        job.write(f"{side} x {side}, dot", joined(z, False) @ joined(v, False).T, numbers)
