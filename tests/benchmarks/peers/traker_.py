"""TRAK: one checkpoint, Rademacher projection of all gradients on the CPU, its own margin for classification."""

import tempfile

import torch
from job import Job
from torch.utils.data import DataLoader
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput
from trak.projectors import BasicProjector, ProjectionType

job = Job()


class Passages(AbstractModelOutput):
    """Of a language model: minus the loss of a passage, and no reweighting."""

    @staticmethod
    def get_output(model, weights, buffers, tokens, targets):
        logits = torch.func.functional_call(model, (weights, buffers), (tokens[None],))
        return -torch.nn.functional.cross_entropy(logits[0], targets)

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        return torch.ones(len(batch[0]), 1)


for width in (510, 1022):
    with tempfile.TemporaryDirectory() as folder:
        model = job.model()
        task = Passages() if job.text else "image_classification"
        size = sum(p.numel() for p in model.parameters())
        projector = BasicProjector(size, width, 0, ProjectionType.rademacher, torch.device("cpu"))
        trak = TRAKer(
            model=model,
            task=task,
            train_set_size=len(job.scored),
            save_dir=folder,
            device="cpu",
            projector=projector,
            proj_dim=width,
            logging_level=40,
        )
        trak.load_checkpoint(model.state_dict(), model_id=0)
        for batch in DataLoader(job.scored, 50):
            trak.featurize(batch=batch, num_samples=len(batch[0]))
        trak.finalize_features()
        trak.start_scoring_checkpoint("lds", model.state_dict(), model_id=0, num_targets=len(job.queries))
        for batch in DataLoader(job.queries, 50):
            trak.score(batch=batch, num_samples=len(batch[0]))
        scores = trak.finalize_scores(exp_name="lds")
        job.write(f"TRAK {width}", torch.tensor(scores), width)
