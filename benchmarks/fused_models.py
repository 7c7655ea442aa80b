"""Training steps of models of transformers: as they are, compiled, and after fm.replace_modules.

    make bench-models
    python benchmarks/fused_models.py [--quick] [--write] [--models llama,gemma] [--skip-compile]

A Llama, Qwen3, Gemma and Mistral of hidden 256 with 2 layers, 512 tokens, float32: forward, backward and AdamW, all
providers in the same rounds, at a vocabulary of 8,192. Peak memory is of forward and backward at a vocabulary of
131,072, counted above weights, gradients and optimizer state, which exist before. First, loss and gradients in bfloat16
are compared with the same weights in float64: the error may be twice eager's. Liger-Kernel's patch joins on a GPU,
where its Triton kernels run.
"""

import argparse
import copy
import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

import fused_megatron as fm
from fused_megatron.benchmarking.report.page_tables import write_tables
from fused_megatron.benchmarking.side_by_side import Rounds, Spread, side_by_side
from fused_megatron.benchmarking.timing_devices import CpuDevice, CudaDevice

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
RESULTS = PAGE.parent / "results" / "fused_models.json"
NAME = "fused models"
"""Of the marks in the page."""
COLUMNS = ["model", "ours", "eager / ours [20-80 %]", "compile / ours", "bar: eager >= 1.05x, compile >= 1x"]
COLUMNS += ["peak MB at 128K: eager, ours", "bar: <= 0.5x", "bf16 error: ours / eager's, loss and worst gradient"]
MODELS = {
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM),
    "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM),
    "gemma": (hf.GemmaConfig, hf.GemmaForCausalLM),
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM),
}
LIGER = {name: f"apply_liger_kernel_to_{name}" for name in MODELS}
SMALL_VOCABULARY, LARGE_VOCABULARY = 8192, 131072


def built(name: str, vocab_size: int, hidden_size: int, device: torch.device) -> Any:
    """Make a model with random weights."""
    config, architecture = MODELS[name]
    sizes = {"hidden_size": hidden_size, "intermediate_size": hidden_size * 11 // 4, "head_dim": hidden_size // 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    return architecture(config(vocab_size=vocab_size, use_cache=False, pad_token_id=0, **sizes, **heads)).to(device)


def fused(model: Any) -> Any:
    """Return a copy with fused layers."""
    twin = copy.deepcopy(model)
    fm.replace_modules(twin)
    return twin


def tokens_of(vocab_size: int, sequences: int, device: torch.device, seed: int = 1) -> torch.Tensor:
    ids = torch.randint(3, vocab_size, (sequences, 256), generator=torch.Generator().manual_seed(seed))
    return ids.to(device)


def errors(name: str, device: torch.device) -> tuple[float, float]:
    """Return our error over eager's in bfloat16: of 8 losses, and the worst of all gradients (norms)."""
    exact = built(name, 997, 64, device).bfloat16().double()
    eager = copy.deepcopy(exact).bfloat16()
    batches = [tokens_of(997, 1, device, seed) for seed in range(8)]
    numbers = []
    for model in (exact, eager, fused(eager)):
        losses = [model(input_ids=ids, labels=ids).loss for ids in batches]
        losses[0].backward()
        numbers.append([torch.stack(losses).detach().double(), *(p.grad.double() for p in model.parameters())])
    # An error below a float32 rounding is no error.
    ratios = [
        float((ours - true).norm()) / max(float((theirs - true).norm()), 1e-6 * float(true.norm()))
        for true, theirs, ours in zip(*numbers, strict=True)
    ]
    return ratios[0], max(ratios[1:])


def peak_mb(model: Any, ids: torch.Tensor, device: Any) -> float:
    """Measure the peak of forward and backward above weights and gradients."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    return (device.peak_bytes(step) or 0) / 1e6


def step_of(model: Any, ids: torch.Tensor, call: Callable[..., Any] | None = None) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    run = model if call is None else call

    def step() -> None:
        run(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # state and compilation are no part of a step
    return step


def liger_of(name: str, model: Any) -> Any:
    """Return a copy with Liger-Kernel's patch, which changes only this instance."""
    import liger_kernel.transformers as liger  # noqa: PLC0415 (optional, and it needs Triton and a GPU)

    twin = copy.deepcopy(model)
    getattr(liger, LIGER[name])(model=twin)
    return twin


def measured(name: str, options: argparse.Namespace, device: Any) -> list[str]:
    """Measure one model; return its cells of the table."""
    hidden, sequences = (32, 1) if options.quick else (256, 2)
    small, large = (97, 997) if options.quick else (SMALL_VOCABULARY, LARGE_VOCABULARY)
    loss_error, gradient_error = errors(name, device.device)
    model = built(name, small, hidden, device.device)
    ids = tokens_of(small, sequences, device.device)
    steps = {"ours": step_of(fused(model), ids), "eager": step_of(copy.deepcopy(model), ids)}
    if not options.skip_compile and not options.quick:
        twin = copy.deepcopy(model)
        steps["compile"] = step_of(twin, ids, torch.compile(twin))
    if device.is_gpu:
        steps["Liger"] = step_of(liger_of(name, model), ids)
    count = 2 if options.quick else options.rounds
    seconds = side_by_side(steps, device, Rounds(0.0, count, count, warm_up=False))
    ours = sorted(seconds["ours"])[len(seconds["ours"]) // 2]
    ratios = {n: Spread.of([a / b for a, b in zip(s, seconds["ours"], strict=True)]) for n, s in seconds.items()}
    shown = {n: f"{r.median:.2f}x [{r.low:.2f}-{r.high:.2f}]" for n, r in ratios.items()}
    wanted = {"eager": 1 / 0.95, "compile": 1.0}
    bars = "; ".join(_verdict(n, ratios[n], bar) for n, bar in wanted.items() if n in ratios)
    model = built(name, large, hidden, device.device)
    ids = tokens_of(large, 2 * sequences, device.device)
    peaks = [peak_mb(one, ids, device) for one in (model, fused(model))]
    memory = "met" if peaks[1] <= 0.5 * peaks[0] else "MISSED"
    others = shown.get("compile", "-") + (f"; Liger {shown['Liger']}" if "Liger" in shown else "")
    row = [name, f"{1e3 * ours:.0f} ms", shown["eager"], others, bars, f"{peaks[0]:.0f}, {peaks[1]:.0f}"]
    return [*row, f"{memory} ({peaks[1] / peaks[0]:.2f})", f"{loss_error:.2f}, {gradient_error:.2f}"]


def _verdict(name: str, ratio: Spread, bar: float) -> str:
    if ratio.median >= bar:
        return f"{name} met"
    return f"{name} {'even' if ratio.high >= bar or ratio.median * 1.1 >= bar else 'MISSED'} ({ratio.median:.2f})"


def table(found: dict[str, Any]) -> str:
    """Return what docs/results/fused_models.json has as a table of Markdown, with a line about its run."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *([row[name] for name in COLUMNS] for row in found["rows"])]
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    run = f"{found['threads']} threads, {found['rounds']} rounds, load {found['load at the end']} at the end"
    return "\n".join([*lines, "", f"`docs/results/fused_models.json`, {found['date']}: {run}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only check that all of it runs: figures mean nothing")
    parser.add_argument("--write", action="store_true", help="write the table of docs/results.md")
    parser.add_argument("--models", default=",".join(MODELS), help="which of them, by commas")
    parser.add_argument("--skip-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    device = CudaDevice() if torch.cuda.is_available() else CpuDevice()
    rows = []
    for name in options.models.split(","):
        rows.append(dict(zip(COLUMNS, measured(name, options, device), strict=True)))
        print(f"{rows[-1]}", flush=True)
    found = {
        "date": datetime.date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "load at the end": round(os.getloadavg()[0], 1),
        "rows": rows,
    }
    print(table(found))
    if options.write:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        write_tables(PAGE, {NAME: table(found)})


if __name__ == "__main__":
    main()
