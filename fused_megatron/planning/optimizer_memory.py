"""Formulas for the memory of the optimizer: state, main weights, and temporary tensors of an update."""

from fused_megatron.config import OptimizerConfig, TransformerConfig
from fused_megatron.config.training import ELEMENT_BYTES
from fused_megatron.data_parallel.fixed_sizes import BATCH_ELEMENTS

_OF_A_MATRIX = 7
"""Muon: the matrix, its blocks sent and received, and two iterates and two products of Newton-Schulz."""


def optimizer_bytes(config: OptimizerConfig, dtype: str, num_matrix_elements: int, num_others: int) -> int:
    """Compute the bytes of state and main weights.

    Args:
        config: kind of optimizer and state_dtype.
        dtype: dtype of the parameters.
        num_matrix_elements: elements that Muon would update.
        num_others: all other elements.
    """
    main = 4 if dtype != "float32" else 0
    tensors = _state_tensors(config)
    of_matrices = 1 if config.kind == "muon" else tensors
    state = ELEMENT_BYTES[config.state_dtype] * (of_matrices * num_matrix_elements + tensors * num_others)
    return state + main * (num_matrix_elements + num_others)


def update_bytes(config: OptimizerConfig, dtype: str, model: TransformerConfig, num_elements: int) -> int:
    """Compute the bytes of temporary tensors while num_elements of a model are updated."""
    batch = min(BATCH_ELEMENTS, num_elements)
    needed = (8 if config.kind in ("sgd", "lion") else 0) * batch
    if config.kind == "muon":
        needed = _OF_A_MATRIX * ELEMENT_BYTES[dtype] * _largest_matrix(model)
    if config.state_dtype != "float32":
        needed += 4 * (num_elements if config.kind == "muon" else _state_tensors(config) * batch)
    return needed


def _state_tensors(config: OptimizerConfig) -> int:
    """Count the tensors of state that an elementwise rule has for a parameter; Muon updates vectors by AdamW."""
    return {"sgd": int(config.momentum_used > 0), "lion": 1}.get(config.kind, 2)


def _largest_matrix(model: TransformerConfig) -> int:
    """Count the elements of a block's largest full parameter; equal numbers of q, k, v heads make one matrix."""
    heads = model.num_heads * (3 if model.kv_heads == model.num_heads else 1)
    return model.hidden_size * max(model.ffn_size, heads * model.head_size)
