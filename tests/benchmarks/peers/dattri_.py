"""dattri: EK-FAC, LoGra, FactGraSS and a factored mask, with the empirical Fisher of what is kept."""

import tempfile
from types import SimpleNamespace

import torch
from dattri.algorithm import FactGraSSAttributor, IFAttributorEKFAC, LoGraAttributor
from dattri.algorithm.block_projected_if.block_projected_if import BlockProjectedIFAttributor
from dattri.task import AttributionTask
from job import Job
from torch.utils.data import DataLoader, Dataset

# Its LoGra fails on inputs without a position axis.
job = Job(positions=True)
LAYERS = sum(isinstance(m, torch.nn.Linear) for m in job.model().modules())
DAMPINGS = (0.1, 1.0)


def loaders(dictionaries):
    kinds = (Dictionaries(job.scored), Dictionaries(job.queries)) if dictionaries else (job.scored, job.queries)
    return [DataLoader(rows, 50) for rows in kinds]


class Dictionaries(Dataset):
    """Its projected methods take the loss of a query from the model itself, and for dictionaries only."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        x, y = self.rows[i]
        return {"x": x, "y": y}


class WithLoss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = job.model()

    def forward(self, x, y):
        return SimpleNamespace(loss=job.losses(self.inner, (x, y)).mean())


def run(mode, attributor, numbers=0, dictionaries=True):
    scored, queries = loaders(dictionaries)
    attributor.cache(scored)
    with torch.enable_grad():
        job.write(mode, attributor.attribute(scored, queries), numbers)


def task():
    model = WithLoss()
    return AttributionTask(
        loss_func=lambda m, batch, device: m(**batch).loss, model=model, checkpoints=model.state_dict()
    )


def projected(mode, make, numbers):
    for damping in DAMPINGS:
        with tempfile.TemporaryDirectory() as folder:
            run(f"{mode}, c = {damping:g}", make(damping, folder), numbers)


for side in job.sides:
    projected(
        f"LoGra {side} x {side}",
        lambda c, f, side=side: LoGraAttributor(task(), damping=c, proj_dim=side**2, offload="cpu", cache_dir=f),
        side * side * LAYERS,
    )
    projected(
        f"FactGraSS {side * side}",
        lambda c, f, side=side: FactGraSSAttributor(
            task(), damping=c, proj_dim=side**2, blowup_factor=4, offload="cpu", cache_dir=f
        ),
        side * side * LAYERS,
    )
    mask = {"device": "cpu", "proj_dim": side, "proj_max_batch_size": 64, "proj_type": "random_mask"}
    projected(
        f"factored mask {side} x {side}",
        lambda c, f, mask=mask: BlockProjectedIFAttributor(
            task(), hessian="eFIM", damping=c, sparsifier_kwargs=mask, offload="cpu", cache_dir=f
        ),
        side * side * LAYERS,
    )


def functional(params, batch):
    outputs = torch.func.functional_call(MODEL, params, batch[0])
    return torch.nn.functional.cross_entropy(outputs.flatten(0, -2), batch[1].flatten())


# Its EK-FAC, on the other hand, fails on inputs with a position axis of length 1.
job = Job()
MODEL = job.model()
for damping in (1e-4, 1e-2):
    ekfac = AttributionTask(loss_func=functional, model=MODEL, checkpoints=MODEL.state_dict())
    attributor = IFAttributorEKFAC(ekfac, device=torch.device("cpu"), damping=damping)
    run(f"EK-FAC, damping {damping:g}", attributor, dictionaries=False)
