"""Start here when ranks train on different text, tokenizers or settings without an error."""

import dataclasses
import os
from pathlib import Path

import pytest

from fused_megatron.checks import InputError
from fused_megatron.config import DataConfig, GPTConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.data.indexed_dataset import IndexedDatasetWriter
from fused_megatron.data.tokenizer import train_tokenizer
from fused_megatron.testing.run_on_ranks import RankError, run_on_ranks
from fused_megatron.training.same_start import check_same_data
from fused_megatron.training.train import train

HERE = {
    "tokens": "a b",
    "tokenizer": "c",
    "vocabulary": "7",
    "tokens_path": "/here/train.bin",
    "tokenizer_path": "/here/t.json",
}


def test_what_differs_is_named_with_rank_and_path() -> None:
    elsewhere = {"tokens_path": "/there/train.bin", "tokenizer_path": "/there/t.json"}
    check_same_data(HERE, HERE, {**HERE, **elsewhere})
    with pytest.raises(
        InputError, match=r"the tokens of rank 2 \(/there/train.bin\) is not what rank 0 has \(/here/tr"
    ):
        check_same_data(HERE, HERE, {**HERE, **elsewhere, "tokens": "a z"})
    with pytest.raises(InputError, match=r"the tokenizer of rank 1 \(/here/t.json\) is not .* \(of the same path\)"):
        check_same_data(HERE, {**HERE, "tokenizer": "z"})
    with pytest.raises(InputError, match=r"the vocabulary of rank 1 \(/here/train.bin\)"):
        check_same_data(HERE, {**HERE, "vocabulary": "8"})


def train_in_own_folder(rank: int, world_size: int, folder: str, config: TrainConfig) -> None:
    os.chdir(os.path.join(folder, f"disk-{rank}"))  # the same paths, on the rank's own disk
    train(config, Path(folder) / "run")


CONFIG = TrainConfig(
    GPTConfig(num_layers=1, hidden_size=16, num_heads=2, seq_len=16),
    ParallelConfig(tensor_parallel_size=2),
    DataConfig(path="text.txt", cache_folder="cache", tokenizer_vocab_size=270),
    training=TrainingConfig(num_steps=1, global_batch_size=4, microbatch_size=2, eval_batches=1),
)


@pytest.mark.parametrize("what", ["text", "tokens", "tokenizer"])
def test_ranks_with_other_data_on_local_disks(tmp_path: Path, what: str) -> None:
    text = "\n\n".join("the quick brown fox jumps over the lazy dog " * 9 for _ in range(40))
    for rank in range(2):
        disk = tmp_path / f"disk-{rank}"
        disk.mkdir()
        (disk / "text.txt").write_text(text.replace("quick", "swift") if rank and what == "text" else text)
        train_tokenizer([text], 270, disk / "tokenizer.json")
        with IndexedDatasetWriter(disk / "tokens", "u2", vocab_size=270) as writer:
            for document in range(40):
                writer.add_document([document, 9 if rank and what == "tokens" and document == 30 else 8, *range(50)])
        if rank and what == "tokenizer":
            with (disk / "tokenizer.json").open("a") as file:
                file.write("\n")
    data = CONFIG.data
    if what != "text":
        data = dataclasses.replace(data, path="tokens", tokenizer_path="tokenizer.json")
    with pytest.raises(RankError) as caught:
        run_on_ranks(train_in_own_folder, 2, str(tmp_path), dataclasses.replace(CONFIG, data=data))
    for rank in (0, 1):
        said = str(caught.value.errors[rank])
        assert isinstance(caught.value.errors[rank], InputError)
        path = {"text": "cache/text-", "tokens": "tokens.bin", "tokenizer": "tokenizer.json"}[what]
        assert f"the {'tokens' if what == 'text' else what} of rank 1 (" in said and path in said
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
