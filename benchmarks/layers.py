"""Speed of tensor-parallel layers on two ranks: MLP and self-attention, ours with and without overlap, and DTensor's.

    make bench-layers
    python benchmarks/layers.py --short        # what make bench runs

models.ParallelMLP and models.ParallelSelfAttention against the same layer of torch modules under parallelize_module,
from the same weights, in float32, on two gloo ranks. tp=2: the input and the result are whole on every rank. tp=2 + sp:
they are shards of the sequence. First, the result and the gradients of the input and of every weight are compared with
the whole layer in float64; a provider that differs gets one line and no figure. All providers run in the same rounds.
"""

import argparse
from collections.abc import Iterator

from run_of_layouts import Case, parser_of, rounds_of, run_cases, threads_of
from sharded_layers import DTENSOR, RANKS, WAYS, WITHOUT_OVERLAP, Layer, on_rank
from steps_on_ranks import fill, run_providers

from fused_megatron.benchmarking.side_by_side import OURS, Bars, Comparison


def compared(layer: Layer, rounds: int, limit_s: float) -> tuple[list[Comparison], bool]:
    """Compare ours with overlap, and without, with the same DTensor layer."""
    print(f"\n{layer.op} {layer.label}", flush=True)
    measured, go_on = run_providers(on_rank, RANKS, WAYS, layer, threads_of(RANKS), rounds, limit_s=limit_s)
    found = []
    for own, suffix in ((OURS, ""), (WITHOUT_OVERLAP, ", overlap off")):
        comparison = Comparison(
            layer.op,
            layer.label + suffix,
            "float32",
            None,
            Bars(),
            ranks=RANKS,
            tokens=layer.seq_len * layer.batch,
            model_flops=layer.flops,
            hardware_flops=layer.flops,
        )
        found.append(fill(comparison, measured, {own: OURS, DTENSOR: DTENSOR}))
    return [c for c in found if c.seconds or c.faults], go_on


def layers_of(options: argparse.Namespace) -> Iterator[Layer]:
    sizes = [(16, 2, 32, 4)] if options.quick else [(256, 8, 256, 4), (512, 2, 512, 8)]
    for size in sizes[-1:] if options.short else sizes:
        for kind in ("MLP", "attention"):
            for sequence_parallel in (False, True):
                for backward in (True,) if options.quick or options.short else (False, True):
                    if not options.only or options.only in (kind, "tp + sp" if sequence_parallel else "tp"):
                        yield Layer(kind, *size, sequence_parallel, backward)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--only", choices=["MLP", "attention", "tp", "tp + sp"])
    options = parser.parse_args()
    rounds = rounds_of(options) * (1 if options.quick else 5)  # layers take milliseconds

    def case(layer: Layer) -> Case:
        return lambda: compared(layer, rounds, options.limit_s)

    run_cases("layers", options, [case(layer) for layer in layers_of(options)], [RANKS], whole=not options.only)


if __name__ == "__main__":
    main()
