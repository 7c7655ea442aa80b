"""Start here when BERT's samples mask the wrong tokens, or differ from run to run."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fused_megatron.checks import InputError
from fused_megatron.config import BERTConfig, DataConfig, TrainConfig, TrainingConfig
from fused_megatron.data.masked_lm import TRAINING_STREAM, VALIDATION_STREAM, MaskedLM, masked_lm
from fused_megatron.data.tokenizer import MASKED_LM_TOKENS, load_tokenizer, train_tokenizer
from fused_megatron.data.training_data import TrainingData, open_training_data

PAD, CLS, SEP, MASK = range(4)
MASKING = MaskedLM(PAD, CLS, SEP, MASK, np.arange(4, 50), seq_len=130, mask_fraction=0.15, seed=7)


def rows(count: int, text_len: int = 128) -> np.ndarray:
    """Return rows of random tokens, each with one more token than is read."""
    return np.random.default_rng(3).integers(4, 50, (count, text_len + 1))


def test_a_sample_is_framed_and_its_targets_are_the_original_tokens() -> None:
    text = rows(3)
    batch = MASKING.batch(text, 0, TRAINING_STREAM)
    assert batch.inputs.shape == batch.targets.shape == (3, 130) and batch.key_padding_mask is None
    assert (batch.inputs[:, 0] == CLS).all() and (batch.inputs[:, -1] == SEP).all()
    chosen = batch.targets >= 0
    assert not chosen[:, 0].any() and not chosen[:, -1].any()
    whole = torch.from_numpy(text[:, :128])
    assert torch.equal(batch.targets[:, 1:-1][chosen[:, 1:-1]], whole[chosen[:, 1:-1]])
    assert torch.equal(batch.inputs[:, 1:-1][~chosen[:, 1:-1]], whole[~chosen[:, 1:-1]])
    assert (chosen.sum(dim=1) == round(0.15 * 128)).all()


def test_shares_of_masked_replaced_and_kept_tokens() -> None:
    text = rows(2000)
    batch = MASKING.batch(text, 0, TRAINING_STREAM)
    chosen = batch.targets >= 0
    total = int(chosen.sum())
    masked = (batch.inputs[chosen] == MASK).sum() / total
    stays = (batch.inputs[chosen] == batch.targets[chosen]).sum() / total
    replaced = batch.inputs[chosen & (batch.inputs != MASK) & (batch.inputs != batch.targets)]
    # 38,000 draws: the standard deviations of the shares are 0.2 % and 0.15 %; one in 46 is replaced by itself.
    assert abs(float(masked) - 0.8) < 0.01 and abs(float(stays) - 0.1 - 0.1 / 46) < 0.01
    assert int(replaced.min()) == 4 and int(replaced.max()) == 49
    # Every position is chosen about equally often: 2000 x 19 / 128 = 297 times, with a standard deviation of 16.
    counts = chosen[:, 1:-1].sum(dim=0)
    assert int((counts - 297).abs().max()) < 5 * 16


def test_nothing_but_seed_sample_and_stream_decides() -> None:
    text = rows(8)
    whole = MASKING.batch(text, 40, TRAINING_STREAM)
    for first in (0, 3, 7):
        one = MASKING.batch(text[first : first + 1], 40 + first, TRAINING_STREAM)
        assert torch.equal(one.inputs, whole.inputs[first : first + 1])
        assert torch.equal(one.targets, whole.targets[first : first + 1])
    others = MaskedLM(PAD, CLS, SEP, MASK, MASKING.ordinary, seq_len=130, mask_fraction=0.15, seed=8)
    for other in (
        MASKING.batch(text, 41, TRAINING_STREAM),
        MASKING.batch(text, 40, VALIDATION_STREAM),
        others.batch(text, 40, TRAINING_STREAM),
    ):
        # Two independent choices of 19 of 128 positions agree in 19 x 19 / 128 = 3 positions.
        same = ((other.targets >= 0) & (whole.targets >= 0)).sum(dim=1)
        assert (same < 12).all()
    # Golden values: other machines and numpy versions mask the same positions.
    assert (whole.targets[0] >= 0).nonzero().flatten().tolist()[:6] == [1, 11, 14, 16, 17, 19]


def test_short_and_empty_rows_are_padded() -> None:
    text = rows(3)
    text[0, 5:], text[1, 1:], text[2, :] = -100, -100, -100
    batch = MASKING.batch(text, 0, VALIDATION_STREAM)
    assert batch.key_padding_mask is not None
    assert (~batch.key_padding_mask).sum(dim=1).tolist() == [7, 3, 2]
    assert (batch.targets >= 0).sum(dim=1).tolist() == [1, 1, 0]
    assert batch.inputs[0, 6:8].tolist() == [SEP, PAD] and batch.inputs[2, :3].tolist() == [CLS, SEP, PAD]
    assert (batch.inputs[batch.key_padding_mask] == PAD).all() and (batch.targets[batch.key_padding_mask] == -100).all()
    inputs, targets, keywords = batch.microbatches(2, torch.device("cpu"))
    assert [len(part) for part in inputs] == [len(part) for part in targets] == [2, 1]
    assert torch.equal(keywords[1]["key_padding_mask"], batch.key_padding_mask[2:])


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {i * i % 97} of a text [MASK] says {'ab' * (i % 5)}.\n" for i in range(400)))
    return path


def opened(text: Path, **changes: str | None) -> TrainingData:
    config = TrainConfig(
        model=BERTConfig(num_layers=1, hidden_size=16, num_heads=2, seq_len=20),
        data=DataConfig(**{
            "path": str(text), "cache_folder": str(text.parent / "cache"), "tokenizer_vocab_size": 280, **changes,
        }),
        training=TrainingConfig(global_batch_size=8, microbatch_size=2),
    )  # fmt: skip
    return open_training_data(config, lambda *progress: None)


def test_data_parallel_ranks_share_the_rows_of_one_process(text: Path) -> None:
    data = opened(text)
    assert data.masking is not None and data.targets_per_sample == round(0.15 * 18)
    ids = data.masking
    assert [ids.pad, ids.cls, ids.sep, ids.mask] == [0, 1, 2, 3] and data.vocab_size == 280
    for read in (data.training_batch, data.validation_batch):
        for start in (0, 16) if read == data.training_batch else (0, 1):
            whole, halves = read(start, 8, 0, 1), [read(start, 8, rank, 2) for rank in (0, 1)]
            assert torch.equal(whole.inputs, torch.cat([half.inputs for half in halves]))
            assert torch.equal(whole.targets, torch.cat([half.targets for half in halves]))
    batch = data.training_batch(0, 8, 0, 1)
    # The string [MASK] in a text is plain text: only chosen positions hold the special token.
    assert ((batch.inputs == ids.mask) <= (batch.targets >= 0)).all()
    # Every held-out token is read once: all except a few last ones are in a sample.
    last = data.validation.num_batches(8) - 1
    read_tokens = sum(int((~padded).sum()) for padded in paddings(data, last)) - 2 * 8 * (last + 1)
    assert 0 <= data.validation.documents.total_tokens - read_tokens <= 1


def paddings(data: TrainingData, last: int) -> list[torch.Tensor]:
    batches = [data.validation_batch(i, 8, 0, 1) for i in range(last + 1)]
    return [
        torch.zeros_like(b.inputs, dtype=torch.bool) if b.key_padding_mask is None else b.key_padding_mask
        for b in batches
    ]


def test_tokenizers_of_other_models(text: Path, tmp_path: Path) -> None:
    theirs = train_tokenizer([text.read_text()], 280, tmp_path / "t.json", ("<s>", "<pad>", "</s>", "<mask>"))
    found = masked_lm(theirs, "t.json", seq_len=20, mask_fraction=0.5, seed=0)
    assert [found.pad, found.cls, found.sep, found.mask] == [1, 0, 2, 3] and found.ordinary.tolist()[0] == 4
    assert theirs.end_of_document == 2 and found.num_targets(1) == 1 and found.num_targets(0) == 0
    with pytest.raises(InputError, match=r"gpt\.json: the tokenizer has no token \[PAD\] or <pad>, which model.family"):
        train_tokenizer([text.read_text()], 280, tmp_path / "gpt.json")
        opened(text, tokenizer_path=str(tmp_path / "gpt.json"))
    with pytest.raises(InputError, match=r"model.family='bert' needs to know .* give data.tokenizer_path"):
        masked_lm(None, None, seq_len=20, mask_fraction=0.15, seed=0)
    with pytest.raises(InputError, match=r"vocab_size=259 must be at least 260 \(256 bytes and \[PAD\], \[CLS\]"):
        train_tokenizer(["text"], 259, tmp_path / "small.json", MASKED_LM_TOKENS)


def test_a_tokenizer_with_truncation_and_padding_encodes_full_texts(text: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    train_tokenizer([text.read_text()], 280, tmp_path / "t.json", MASKED_LM_TOKENS)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    backend.enable_truncation(8)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "cuts.json"))
    whole, cuts = (load_tokenizer(tmp_path / name) for name in ("t.json", "cuts.json"))
    for text_of in ("a", "line 3 of a text that is longer than eight tokens"):
        assert cuts.encode(text_of).tolist() == whole.encode(text_of).tolist()
