"""dattri-llm: a coordinate mask of 256 a layer, written by its own thread."""

import tempfile

from dattri_llm import GradientStorageManager, HookManager, HookManagerConfig, OffloadCallback
from lm_job import Job

job = Job()
model = job.model(frozen=True)
patterns = [f"^{name}$".replace(".", r"\.") for name in job.linear]
mask = {"__default__": {"style": "mask", "proj_dim": 256}}


def build():
    with tempfile.TemporaryDirectory() as folder:
        offload = OffloadCallback(
            offload_interval=1,
            file_manager=GradientStorageManager(folder),
            recording_type="per_sample",
            async_write=True,
        )
        hooks = HookManagerConfig(linear_io=patterns, projection_kwargs=mask, include_frozen=True)
        with HookManager(model, config=hooks, callbacks=[offload]).collect(deregister_on_exit=True):
            for id_BT in job.batches():
                model.zero_grad(set_to_none=True)
                job.losses(model, id_BT).sum().backward()


job.write("mask of 256 a layer", build)
