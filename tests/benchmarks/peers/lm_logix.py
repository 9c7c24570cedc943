"""LogIX: gradients of rank 16 (its LoRA), logged without statistics."""

import logging
import os
import tempfile
from itertools import count
from pathlib import Path

import torch
from lm_job import Job
from logix import LogIX

logging.disable(logging.INFO)
job = Job()
model = job.model()
numbers = count()
with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    Path("config.yaml").write_text("lora: {init: random, rank: 16}\n")
    run = LogIX(project="timed", config="config.yaml")
    # Frozen where it does not watch: the head as well.
    run.watch(model, type_filter=[torch.nn.Linear], name_filter=["self_attn", "mlp"])
    run.add_lora()
    run.setup({"grad": ["log"]})
    run.save(True)

    def build():
        for id_BT in job.batches():
            with run(data_id=[str(next(numbers)) for _ in id_BT]):
                model.zero_grad(set_to_none=True)
                job.losses(model, id_BT).sum().backward()

    job.write("rank 16 a layer", build)
