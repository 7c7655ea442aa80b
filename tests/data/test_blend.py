"""Start here when a blend of several texts has other proportions, another order, or is refused."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from fused_megatron.checks import InputError
from fused_megatron.config import DataConfig, GPTConfig, TrainConfig, TrainingConfig
from fused_megatron.config.config_file import load_config, save_config
from fused_megatron.data.blend import BlendedDataset, BlendedValidation, BlendOrder
from fused_megatron.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from fused_megatron.data.token_dataset import TokenDataset, ValidationDataset
from fused_megatron.data.training_data import TrainingData, open_training_data

SEQ_LEN = 8


@pytest.mark.parametrize("weights", [[1, 1], [0.7, 0.3], [1e-3, 1, 2.5], [5.0], [0.1] * 7], ids=str)
def test_each_dataset_has_its_share_at_every_time_and_reads_its_samples_in_order(weights: list[float]) -> None:
    order = BlendOrder(weights)
    seen = [0] * len(weights)
    for i in range(3000):
        assert order.counts(i) == seen
        dataset, sample = order.sample(i)
        assert sample == seen[dataset]
        seen[dataset] += 1
        shares = [(i + 1) * weight / sum(weights) for weight in weights]
        assert max(abs(count - share) for count, share in zip(seen, shares, strict=True)) < len(weights)
    # Any sample is found from its number.
    far = 10**15
    assert sum(order.counts(far)) == far and order.counts(far)[0] == pytest.approx(far * weights[0] / sum(weights))


def test_the_order_is_what_it_was_written_down_to_be() -> None:
    """A run that resumes after an update of this library must read on in the same order."""
    order = BlendOrder([0.5, 0.3, 0.2])
    assert [order.sample(i)[0] for i in range(12)] == [0, 1, 0, 2, 0, 1, 0, 2, 0, 1, 0, 1]


def datasets_of(folder: Path, *lengths: list[int]) -> list[IndexedDataset]:
    """Write datasets whose tokens are 100,000 x dataset + 1,000 x document + offset."""
    for number, each in enumerate(lengths):
        with IndexedDatasetWriter(folder / str(number), np.int32) as writer:
            for document, length in enumerate(each):
                writer.add_document(100_000 * number + 1000 * document + np.arange(length))
    return [IndexedDataset(folder / str(number)) for number in range(len(lengths))]


def test_batches_are_the_same_at_every_data_parallel_size_and_after_any_number_of_samples(tmp_path: Path) -> None:
    parts = [TokenDataset(each, SEQ_LEN, 3) for each in datasets_of(tmp_path, [40, 3, 0, 25], [7, 9, 200])]
    blend = BlendedDataset(parts, [0.25, 0.75])
    whole = blend.rows(0, 64)
    assert (whole // 100_000 == whole[:, :1] // 100_000).all() and (whole[:, 0] >= 100_000).sum() == 48
    for first, count in ((0, 5), (17, 16), (40, 24)):
        assert np.array_equal(blend.rows(first, count), whole[first : first + count])
        starts = blend.document_starts(first, count)
        changes = blend.rows(first, count) // 1000
        assert np.array_equal(starts[:, 1:], changes[:, 1:] != changes[:, :-1]) and starts[:, 0].all()
        assert blend.num_document_starts(first, count) == starts[:, 1:].sum()


@pytest.mark.parametrize("dp_size", [1, 2])
def test_every_held_out_token_is_a_target_once(tmp_path: Path, dp_size: int) -> None:
    sets = datasets_of(tmp_path, [40, 3, 0, 25], [7, 9, 20])
    held_out = BlendedValidation([ValidationDataset(each, SEQ_LEN) for each in sets])
    batches = [
        held_out.batch(index, 4, rank, dp_size) for index in range(held_out.num_batches(4)) for rank in range(dp_size)
    ]
    targets = np.concatenate(batches)[:, 1:]
    wanted = np.concatenate([each.tokens(1, each.total_tokens) for each in sets])
    assert sorted(targets[targets >= 0]) == sorted(wanted)
    starts = held_out.document_starts(0, held_out.num_samples + 3)
    assert starts[:, 0].all() and starts[-3:, 1:].sum() == 0 and starts.sum() > held_out.num_samples


def write(path: Path, word: str) -> str:
    draw = random.Random(word)
    pages = [" ".join(f"{word} {draw.randrange(40)}" for _ in range(40)) for _ in range(30)]
    path.write_text("\n".join(json.dumps({"text": page}) for page in pages))
    return str(path)


def opened(tmp_path: Path, **data: object) -> TrainingData:
    config = TrainConfig(
        GPTConfig(seq_len=SEQ_LEN),
        data=DataConfig(**{"cache_folder": str(tmp_path / "cache"), "tokenizer_vocab_size": 280, **data}),
        training=TrainingConfig(global_batch_size=4, microbatch_size=2, eval_batches=2),
    )
    return open_training_data(config, lambda *_: None)


def test_texts_share_a_tokenizer_and_the_weights_belong_to_the_data(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    paths = (write(tmp_path / "a.jsonl", "apple"), write(tmp_path / "b.jsonl", "banana"))
    data = opened(tmp_path, path=paths, weights=(1.0, 3.0))
    assert data.description == f"0.25 {paths[0]} + 0.75 {paths[1]}"
    texts = [data.tokenizer.decode(row) for row in data.training.rows(0, 16)]
    # A sample of 9 tokens holds a word of its own text, whole or in part.
    assert sum("ban" in text for text in texts) == 12 and not any("app" in text and "ban" in text for text in texts)
    assert data.validation.num_samples == 2 + 6
    other = opened(tmp_path, path=paths, weights=(1.0, 2.0))
    assert other.fingerprint != data.fingerprint == opened(tmp_path, path=paths, weights=(1.0, 3.0)).fingerprint
    # Without weights: by tokens.
    shares = opened(tmp_path, path=paths)
    tokens = [part.documents.total_tokens for part in shares.training.parts]
    assert shares.training.order.counts(10_000)[0] == pytest.approx(10_000 * tokens[0] / sum(tokens), abs=1)


def test_ids_and_text_need_the_tokenizer_of_the_ids(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    text = write(tmp_path / "a.jsonl", "apple")
    datasets_of(tmp_path, [100, 100])
    with pytest.raises(
        InputError, match=r"data\.path=.*/0 has token ids, and other paths have text: give data\.tokeni"
    ):
        opened(tmp_path, path=(text, str(tmp_path / "0")))
    tokenizer = opened(tmp_path, path=text).tokenizer_path
    with IndexedDatasetWriter(tmp_path / "ids", np.uint16) as writer:
        writer.add_document(np.arange(3, 250))
    both = opened(tmp_path, path=(text, str(tmp_path / "ids")), tokenizer_path=tokenizer)
    assert both.training.rows(0, 8).max() < both.vocab_size


def test_a_list_of_paths_from_file_and_command_line(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('[data]\npath = ["a.jsonl", "b"]\nweights = [0.5, 2]')
    config = load_config(tmp_path / "c.toml")
    assert config.data.path == ("a.jsonl", "b") and config.data.weights == (0.5, 2.0)
    save_config(config, tmp_path / "saved.toml")
    assert load_config(tmp_path / "saved.toml") == config
    given = load_config(tmp_path / "c.toml", ["--data.path", "x", "y", "z", "--data.weights", "1", "2", "3"])
    assert given.data.path == ("x", "y", "z") and given.data.weights == (1.0, 2.0, 3.0)
    assert load_config(tmp_path / "c.toml", ["--data.path", "x", "--data.weights", "none"]).data.path == "x"
    for weights, message in {
        "[1.0]": r"weights=\[1\.0\] must have one number for each path of a list of several \(paths: 2\)",
        "[1.0, 0.0]": "must all be above 0: leave out the path",
        "[1.0, 'x']": "must be a list of numbers",
    }.items():
        (tmp_path / "bad.toml").write_text(f'[data]\npath = ["a", "b"]\nweights = {weights}')
        with pytest.raises(InputError, match=message):
            load_config(tmp_path / "bad.toml")
