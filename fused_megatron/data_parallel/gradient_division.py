"""Division of gradients: once, by the targets of the whole step, where backward begins."""


def gradient_divisor(global_batch_size: int, targets_per_sample: int) -> int:
    """What a step divides its loss by, and with it every gradient: the targets of all data-parallel ranks.

    Microbatches, pipeline stages and data-parallel ranks then only add their gradients up (reduction.py sums and never
    averages), so a target counts the same on whichever rank it is. The pipeline divides, in the first gradient of each
    backward (pipeline/run/stage_compute.py: first_gradient), by what PipelineExecutor.step gets as loss_divisor.

    Args:
        global_batch_size: samples of a step, over all data-parallel ranks.
        targets_per_sample: targets of a sample that count, the same for every sample.
    """
    return global_batch_size * targets_per_sample
