"""The language model of the quality study: a small causal transformer, fine-tuned on real mail.

The mail ships with curator's demo, so nothing is fetched. One base model is trained on some of it; what is explained,
and trained again on halves, is its fine-tuning on other mails: the case that curator is for, and the one in which
retraining says more than the luck of an initialisation.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from curator.demo import mails
from tests.benchmarks.quality_models import TOKENS, VOCABULARY, Transformer, passage_losses

BASE = 3000
"""Mails behind the base model and the tokenizer."""
BASE_EPOCHS, BASE_RATE, BASE_BATCH = 3, 3e-3, 32

Rows = tuple[Tensor, Tensor]


@lru_cache(maxsize=1)
def passages() -> tuple[Tensor, Tensor]:
    """(P, TOKENS + 1) of the mails behind the base, every passage; and of the others, the first passage of each."""
    from tokenizers import ByteLevelBPETokenizer

    texts = [mail.text for mail in mails.read()]
    order = np.random.Generator(np.random.Philox(0)).permutation(len(texts))
    shuffled = [texts[i] for i in order]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(shuffled[:BASE], vocab_size=VOCABULARY, min_frequency=2, show_progress=False)
    tokens = [encoded.ids for encoded in tokenizer.encode_batch(shuffled)]
    base = [ids[at : at + TOKENS + 1] for ids in tokens[:BASE] for at in range(0, len(ids) - TOKENS, TOKENS)]
    return torch.tensor(base), torch.tensor([ids[: TOKENS + 1] for ids in tokens[BASE:] if len(ids) > TOKENS])


def parts(seed: int, sizes: tuple[int, ...]) -> list[Rows]:
    """Passages of so many mails that no base model has seen, in parts that share no mail."""
    _, fresh = passages()
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(fresh))[: sum(sizes)]
    return [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in fresh[order].split(sizes)]


def train_base() -> dict[str, Tensor]:
    """The weights that every fine-tuning starts from."""
    rows, _ = passages()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Transformer()
    rng = np.random.Generator(np.random.Philox(0))
    orders = [torch.from_numpy(rng.permutation(len(rows))) for _ in range(BASE_EPOCHS)]
    batches = [batch for order in orders for batch in order.split(BASE_BATCH)]
    adam = torch.optim.Adam(model.parameters(), lr=BASE_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, BASE_RATE, total_steps=len(batches))
    for batch in batches:
        adam.zero_grad()
        passage_losses(model(rows[batch, :-1]), rows[batch, 1:]).mean().backward()
        adam.step()
        schedule.step()
    return {name: weight.detach() for name, weight in model.state_dict().items()}
