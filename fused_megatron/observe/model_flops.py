"""Floating-point operations of a training step of a GPT: the numerators of MFU and HFU."""

from typing import NamedTuple

from fused_megatron.checks import check, check_one_of
from fused_megatron.config import TransformerConfig


class BlockProducts(NamedTuple):
    """Multiplications of the matrix products of a block, forward, for one token.

    Attributes:
        projections: query, key, value and output.
        attention: scores and their product with the values, with every token of the sequence.
        mlp: its matrices.
    """

    projections: int
    attention: int
    mlp: int


def block_products(config: TransformerConfig) -> BlockProducts:
    """The products of a block of this model.

    With S = seq_len, N heads and G key-value heads of D, F = ffn_hidden_size, m = 2 matrices of an MLP with GELU and 3
    of a gated one (SwiGLU, GEGLU):

        projections  H (2 N D + 2 G D)
        attention    2 S N D
        MLP          m H F
    """
    query_size, kv_size = config.head_size * config.num_heads, config.head_size * config.kv_heads
    matrices = 2 if config.activation.startswith("gelu") else 3
    return BlockProducts(
        projections=config.hidden_size * (2 * query_size + 2 * kv_size),
        attention=2 * config.seq_len * query_size,
        mlp=matrices * config.hidden_size * config.ffn_size,
    )


def gpt_step_flops(config: TransformerConfig, num_tokens: int, *, recompute: str | None = None) -> tuple[int, int]:
    """(model, hardware) FLOPs of a step: what the model asks for, and that with what is recomputed.

    Matrix products alone, 2 operations a multiplication; no norm, softmax, activation, bias, embedding or optimizer.
    A token costs forward, of each of L blocks what block_products says, and once the head (without the vocabulary's
    padding):

        block    = 2 (projections + attention + MLP)
        head     = 2 H V
        model    = 3 (L block + head)                       backward: the products for inputs and for weights
        hardware = model + L block                          recompute "full": every block forward once more
                   model + 2 L attention                    "selective": what lies between the projections
                   model                                    "none"

    Attention is counted in full, though it is causal: a kernel that skips the masked half may seem to exceed the
    device. What a fused attention kernel makes again in its own backward (scores), and a head that makes its logits
    again, count as no recomputation. "selective" is that of a fused kernel: plain products would make only the scores
    again.

    For N D = H, G = N, F = 4 H and GELU, with B sequences, this is

        model             72 B S L H^2 (1 + S / (6 H) + V / (12 L H))
        hardware, "full"  96 B S L H^2 (1 + S / (6 H) + V / (16 L H))

    the second that of Narayanan et al. 2021 (arXiv:2104.04473, equation 3), the first that of Korthikanti et al. 2022
    (arXiv:2205.05198, appendix A). A token of the first costs 6 P + 12 L S H, P being the parameters of the products:
    appendix B of PaLM (Chowdhery et al. 2022, arXiv:2204.02311), which defines MFU, for the same attention.

    Args:
        config: of the whole model; vocab_size must be given.
        num_tokens: of the step, in sequences of config.seq_len, over all ranks.
        recompute: "none", "selective" or "full"; None: config.recompute.

    Raises:
        InputError: another word; no vocab_size.
    """
    recompute = config.recompute if recompute is None else recompute
    check_one_of("recompute", recompute, ("none", "selective", "full"))
    check(config.vocab_size is not None, "vocab_size=None must be given to count the products of the head")
    products = block_products(config)
    block = 2 * sum(products)
    model = 3 * (config.num_layers * block + 2 * config.hidden_size * (config.vocab_size or 0))
    again = {"none": 0, "selective": 2 * products.attention, "full": block}[recompute]
    return num_tokens * model, num_tokens * (model + config.num_layers * again)
