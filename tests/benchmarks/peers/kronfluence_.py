"""kronfluence: EK-FAC with its default damping, and identity."""

import tempfile

import torch
from job import Job
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments
from kronfluence.task import Task

job = Job()


class Losses(Task):
    def compute_train_loss(self, batch, model, sample=False):
        return job.losses(model, batch).sum()

    def compute_measurement(self, batch, model):
        return job.losses(model, batch).sum()

    def get_influence_tracked_modules(self):
        return [n for n, m in job.model().named_modules() if isinstance(m, torch.nn.Linear)]


for strategy in ("ekfac", "identity"):
    with tempfile.TemporaryDirectory() as folder:
        model = prepare_model(model=job.model(), task=Losses())
        analyzer = Analyzer(
            analysis_name="lds", model=model, task=Losses(), cpu=True, output_dir=folder, disable_tqdm=True
        )
        # sample=True would ask for labels drawn from the model; the empirical Fisher is what the other tools take.
        analyzer.fit_all_factors(
            factors_name=strategy,
            dataset=job.scored,
            per_device_batch_size=100,
            factor_args=FactorArguments(strategy=strategy, use_empirical_fisher=True),
        )
        analyzer.compute_pairwise_scores(
            scores_name=strategy,
            factors_name=strategy,
            query_dataset=job.queries,
            train_dataset=job.scored,
            per_device_query_batch_size=50,
            per_device_train_batch_size=100,
        )
        job.write(strategy, analyzer.load_pairwise_scores(scores_name=strategy)["all_modules"].T)
