"""dattri: a factored random mask of 16 x 16 a layer, the cheapest of its compressions, gradients kept in memory."""

import tempfile

import torch
from dattri.algorithm.block_projected_if.block_projected_if import BlockProjectedIFAttributor
from dattri.task import AttributionTask
from lm_job import Job
from torch.utils.data import DataLoader, Dataset

job = Job()
model = job.model(frozen=True)


class Rows(Dataset):
    def __len__(self):
        return len(job.id_NT)

    def __getitem__(self, i):
        return {"input_ids": job.id_NT[i]}


def lost(model, batch, device):
    return job.losses(model, batch["input_ids"]).sum()


task = AttributionTask(loss_func=lost, model=model, checkpoints=model.state_dict())


def build():
    mask = {"device": "cpu", "proj_dim": 16, "proj_max_batch_size": 64, "proj_type": "random_mask"}
    with tempfile.TemporaryDirectory() as folder:
        made = BlockProjectedIFAttributor(
            task, layer_names=job.linear, hessian="Identity", sparsifier_kwargs=mask, offload="cpu", cache_dir=folder
        )
        with torch.enable_grad():
            made.cache(DataLoader(Rows(), job.batch))


job.write("factored mask, 16 x 16 a layer", build)
