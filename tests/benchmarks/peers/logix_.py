"""LogIX: low-rank gradients (its LoRA), K-FAC of them, and its own relative damping."""

import os
import tempfile
from pathlib import Path

import torch
from job import Job
from logix import LogIX
from torch.utils.data import DataLoader

job = Job(positions=True)
for rank in (8, 16, 32):
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("config.yaml").write_text(f"lora: {{init: random, rank: {rank}}}\n")
        run = LogIX(project=f"rank{rank}", config="config.yaml")
        model = job.model()
        run.watch(model, type_filter=[torch.nn.Linear])
        run.add_lora()
        run.setup({"grad": ["log", "covariance"]})
        run.save(True)

        def log(rows, first, run=run, model=model):
            for at, batch in enumerate(DataLoader(rows, 50)):
                ids = [f"{first}{50 * at + i}" for i in range(len(batch[0]))]
                with run(data_id=ids):
                    model.zero_grad()
                    job.losses(model, batch).sum().backward()
                yield run.get_log()

        list(log(job.scored, "z"))
        run.finalize()
        run.setup({"grad": ["log"]})
        run.eval()
        loader = run.build_log_dataloader(batch_size=100)
        found = [run.influence.compute_influence_all(q, loader)["influence"] for q in log(job.queries, "v")]
        layers = sum(isinstance(m, torch.nn.Linear) for m in job.model().modules())
        job.write(f"rank {rank}, K-FAC", torch.cat(found).T, rank * rank * layers)
