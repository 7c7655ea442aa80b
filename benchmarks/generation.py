"""Tokens per second of generation with a key-value cache, beside transformers' `generate` with its cache.

    python benchmarks/generation.py
    python benchmarks/generation.py --rounds 9 --tokens 256 --models small --threads 1

Both continue the same prompts greedily with the same random weights, in one process on the CPU, and must write the same
tokens. Rounds alternate between the two; the ratio is the median of theirs over the median of ours. CPU time is what
the threads of the process took: beside other programs it says more than the time of the clock. The bar: at least 1.0.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from fused_megatron.hugging_face import load_model
from fused_megatron.inference.generation import generate

BAR = 1.0
# Vocabulary, hidden size, width of the MLP, layers, heads, key-value heads.
MODELS = {"small": (8192, 256, 688, 6, 8, 2), "SmolLM2-135M": (49152, 576, 1536, 30, 9, 3)}
PROMPT = 16


def timed(function: Callable[[], torch.Tensor]) -> tuple[float, float, torch.Tensor]:
    """Return seconds of the clock, seconds of CPU time, and the result."""
    clock, cpu = time.perf_counter(), time.process_time()
    result = function()
    return time.perf_counter() - clock, time.process_time() - cpu, result


def measure(sizes: tuple[int, ...], batch: int, num_tokens: int, rounds: int) -> str:
    """Return a row of the table."""
    vocab, hidden, ffn, layers, heads, kv_heads = sizes
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=PROMPT + num_tokens,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    theirs: Any = transformers.LlamaForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours: Any = load_model(folder)
    tokens = torch.randint(vocab, (batch, PROMPT))
    mask = torch.ones_like(tokens)

    def of_transformers() -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = theirs.generate(
                tokens, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False, use_cache=True
            )
        return found

    times: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
    for number in range(rounds + 1):  # the first round warms up
        clock, cpu, found = timed(lambda: generate(ours, tokens, num_tokens, temperature=0.0))
        their_clock, their_cpu, expected = timed(of_transformers)
        if not torch.equal(found, expected):
            raise SystemExit("the texts differ: no ratio")
        if number:
            times["ours"].append((clock, cpu))
            times["theirs"].append((their_clock, their_cpu))
    medians = {who: [statistics.median(each) for each in zip(*rows, strict=True)] for who, rows in times.items()}
    speed = batch * num_tokens / medians["ours"][0]
    ratios = [theirs / ours for theirs, ours in zip(medians["theirs"], medians["ours"], strict=True)]
    verdict = "met" if ratios[1] >= BAR else "missed"
    return f"{speed:8.0f}   {ratios[0]:5.2f}   {ratios[1]:8.2f}   {verdict}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(f"load {os.getloadavg()[0]:.1f}, {options.threads} thread(s), {options.tokens} new tokens")
    print(f"{'model':14} batch   tokens/s   clock   CPU time   bar of {BAR} for the CPU time")
    for name in options.models:
        for batch in options.batches:
            row = measure(MODELS[name], batch, options.tokens, options.rounds)
            print(f"{name:14} {batch:5}   {row}", flush=True)


if __name__ == "__main__":
    main()
