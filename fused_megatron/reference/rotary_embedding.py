"""Rotary position embedding in plain PyTorch."""

import torch

from fused_megatron.reference.precision import widen


def rotary_embedding_forward(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    offset: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    start: int,
    sequence_dim: int,
    interleaved: bool,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute torch.ops.fused_megatron.rotary_embedding: rotated q and k; empty for k=None."""
    position = token_positions(q.shape, q.device, positions, offset, cu_seqlens, start, sequence_dim)
    angles = _rows(cos, position), _rows(sin, position)
    if inverse:
        angles = angles[0], -angles[1]
    q_out = rotate(q, *angles, interleaved).contiguous()
    return q_out, q.new_empty(0) if k is None else rotate(k, *angles, interleaved).contiguous()


def token_positions(
    shape: torch.Size,
    device: torch.device,
    positions: torch.Tensor | None,
    offset: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    start: int,
    sequence_dim: int,
) -> torch.Tensor:
    """Return the position of every token, [S, B], [B, S] or [T]; -1 for packed tokens outside every sequence."""
    seq_len = shape[sequence_dim]
    if positions is not None:
        if positions.dim() == len(shape) - 2:
            return positions
        return positions[:, None].expand(shape[:2]) if sequence_dim == 0 else positions[None].expand(shape[:2])
    token = torch.arange(seq_len, device=device)
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens.long(), token, right=True) - 1
        inside = (sequence >= 0) & (sequence < cu_seqlens.numel() - 1)
        sequence = sequence.clamp(0, max(cu_seqlens.numel() - 2, 0))
        position = token - cu_seqlens.long()[sequence] + start
        if offset is not None:
            position = position + (offset.reshape(-1)[sequence] if offset.numel() > 1 else offset.reshape(()))
        return torch.where(inside, position, -1)
    position = token + start
    if len(shape) == 3:
        return position if offset is None else position + offset.reshape(())
    position = position[:, None] if sequence_dim == 0 else position[None]
    if offset is not None:
        column = offset.reshape(-1)
        position = position + (column[None] if sequence_dim == 0 else column[:, None])
    return position.expand(shape[:2])


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate the first Drot elements of x [..., N, D], in pairs; cos and sin [..., Drot / 2] are per token."""
    half = cos.shape[-1]
    wide, rest = widen(x[..., : 2 * half]), x[..., 2 * half :]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    first, second = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.split(half, dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    whole = torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)
    return torch.cat((whole.to(x.dtype), rest), dim=-1)


def _rows(table: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Return the table's row of each position; NaN, as in the kernels, for a position outside the table."""
    invalid = (position < 0) | (position >= table.shape[0])
    if table.shape[0] == 0:
        return widen(table).new_full((*position.shape, table.shape[1]), torch.nan)
    rows = widen(table)[torch.where(invalid, 0, position)]
    return rows.masked_fill(invalid.unsqueeze(-1), torch.nan)


def rotary_embedding_out(
    q: torch.Tensor,
    k: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    sequence_dim: int,
    inverse: bool,
) -> None:
    """Compute torch.ops.fused_megatron.rotary_embedding_out: write the rotated q and k to memory of the same sizes."""
    rotated = rotary_embedding_forward(q, k, cos, sin, None, None, None, 0, sequence_dim, False, inverse)
    for out, values in zip((q_out, k_out), rotated, strict=True):
        out.copy_(values)
