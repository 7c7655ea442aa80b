"""Floating-point operations of a training step of a GPT: the numerators of MFU and HFU."""

from typing import NamedTuple

from fused_megatron.checks import check, check_one_of
from fused_megatron.config import TransformerConfig


class BlockProducts(NamedTuple):
    """Multiplications in the matrix products of a block's forward pass, for one token.

    Attributes:
        projections: query, key, value and output projections.
        attention: scores, and their product with the values, over all tokens of the sequence.
        mlp: products of the MLP, or of the router and the experts that a token passes through.
    """

    projections: int
    attention: int
    mlp: int


def block_products(config: TransformerConfig, has_experts: bool = False) -> BlockProducts:
    """Count the multiplications of a block of this model.

    With S = seq_len, N heads and G key-value heads of size D, F = ffn_hidden_size, and m = 2 matrices in a GELU MLP, 3
    in a gated MLP (SwiGLU, GEGLU):

        projections  H (2 N D + 2 G D)
        attention    2 S N D
        MLP          m H F
        experts      H E + m H (K F_e + F_s)     E experts of width F_e, K of them a token; shared experts of width F_s;
                                                 one more H for the gate of shared experts

    Args:
        config: of the model.
        has_experts: whether to count a block with experts.
    """
    query_size = config.head_size * config.num_heads
    kv_size = config.head_size * config.kv_heads
    matrices = 2 if config.activation.startswith("gelu") else 3
    mlp = matrices * config.hidden_size * config.ffn_size
    if has_experts:
        width = config.experts_per_token * config.expert_ffn_size + config.shared_ffn_size
        router = config.hidden_size * ((config.num_experts or 0) + config.shared_expert_gate)
        mlp = router + matrices * config.hidden_size * width
    return BlockProducts(
        projections=config.hidden_size * (2 * query_size + 2 * kv_size),
        attention=2 * config.seq_len * query_size,
        mlp=mlp,
    )


def gpt_step_flops(
    config: TransformerConfig, num_tokens: int, *, recompute: str | None = None, visible_pairs: int | None = None
) -> tuple[int, int]:
    """Return the (model, hardware) FLOPs of a step: hardware FLOPs include recomputation.

    Only matrix products count, 2 operations per multiplication; no norm, softmax, activation, bias, embedding or
    optimizer. With block_products for each of L blocks, and the head without vocabulary padding, a token costs:

        block    = 2 (projections + attention + MLP)
        head     = 2 H V
        model    = 3 (L block + head)                       backward: products for inputs and for weights
        hardware = model + L block                          recompute "full": every block's forward again
                   model + 2 L attention                    "selective": everything between the projections
                   model                                    "none"

    Attention counts in full, although it is causal: a kernel that skips the masked half may seem to exceed the peak of
    the device. With visible_pairs, attention counts these pairs instead of all num_tokens S pairs. Scores that a fused
    attention kernel recomputes in its own backward, and logits that a head recomputes, do not count as recomputation.
    "selective" counts a fused kernel: plain products would recompute only the scores. A block with experts counts the
    K experts of each token, also where a capacity drops some.

    For N D = H, G = N, F = 4 H and GELU, with B sequences, this is

        model             72 B S L H^2 (1 + S / (6 H) + V / (12 L H))
        hardware, "full"  96 B S L H^2 (1 + S / (6 H) + V / (16 L H))

    The second formula is equation 3 of Narayanan et al. 2021 (arXiv:2104.04473), the first is appendix A of Korthikanti
    et al. 2022 (arXiv:2205.05198). The first is 6 P + 12 L S H per token, where P is the number of parameters of the
    products: for this attention it equals appendix B of PaLM (Chowdhery et al. 2022, arXiv:2204.02311), which defines
    MFU.

    Args:
        config: of the full model; vocab_size must be set.
        num_tokens: tokens of the step over all ranks, in sequences of config.seq_len.
        recompute: "none", "selective" or "full"; None: config.recompute.
        visible_pairs: number of (query, key) pairs of the step that the mask leaves visible, over all ranks, such as
            `visible_pairs` in the metrics of a run with data.mask_documents; None: every pair of each sequence.

    Raises:
        InputError: another value of recompute, no vocab_size, or more visible pairs than there are.
    """
    recompute = config.recompute if recompute is None else recompute
    check_one_of("recompute", recompute, ("none", "selective", "full"))
    check(config.vocab_size is not None, "vocab_size=None must be given to count the products of the head")
    all_pairs = num_tokens * config.seq_len
    pairs = all_pairs if visible_pairs is None else visible_pairs
    check(0 <= pairs <= all_pairs, f"visible_pairs={pairs} must be at most num_tokens x seq_len={all_pairs}")
    attention = forward = 0
    for block in range(config.num_layers):
        products = block_products(config, config.has_experts(block))
        of_attention = 2 * pairs * products.attention // config.seq_len
        attention += of_attention
        forward += 2 * num_tokens * (products.projections + products.mlp) + of_attention
    head = 2 * num_tokens * config.hidden_size * (config.vocab_size or 0)
    model = 3 * (forward + head)
    return model, model + {"none": 0, "selective": attention, "full": forward}[recompute]
