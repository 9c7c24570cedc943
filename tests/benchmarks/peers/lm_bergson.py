"""bergson's gradient build: a 16 x 16 random projection of each module, written to its index on disk."""

import logging
import tempfile
from pathlib import Path

from bergson.collection import collect_gradients
from bergson.config.config import IndexConfig
from bergson.gradients import GradientProcessor
from datasets import Dataset
from lm_job import Job

logging.disable(logging.INFO)
job = Job()
model = job.model(frozen=True)
model.model.norm.weight.requires_grad_(True)  # it wants something to train
rows = job.id_NT.tolist()
# Its collector drops a column when it is done, so each build starts from the rows again.
batches = [list(range(at, min(at + job.batch, len(rows)))) for at in range(0, len(rows), job.batch)]
data = Dataset.from_dict({"input_ids": rows, "length": [len(row) for row in rows]})


def build():
    with tempfile.TemporaryDirectory() as folder:
        cfg = IndexConfig(
            run_path=str(Path(folder) / "index"),
            projection_dim=16,
            token_batch_size=job.batch * job.id_NT.shape[1],
            loss_reduction="mean",
            filter_modules="lm_head",
        )
        cfg.partial_run_path.mkdir(parents=True, exist_ok=True)
        collect_gradients(model, data, GradientProcessor(projection_dim=16), cfg, batches=batches)


job.write("gradient build, 16 x 16 a layer", build)
