"""Division of gradients by the number of targets of the whole step, made once at the start of backward."""


def gradient_divisor(num_targets: int) -> int:
    """Return the divisor of the loss of a step, and so of every gradient: the targets of all data-parallel ranks.

    Microbatches, pipeline stages, data-parallel and context-parallel ranks then only sum their gradients (reduction.py
    never averages), so that a target counts the same on every rank, however many of them the rank holds. The pipeline
    divides the first gradient of each backward (pipeline/run/stage_compute.py: first_gradient) by the argument
    loss_divisor of PipelineExecutor.step.

    Args:
        num_targets: targets that count in the step, over all data-parallel ranks. Without one the divisor is 1: the
            loss and all gradients are 0.
    """
    return max(1, num_targets)
