"""FLOPs of operators: torch's own formulas, and those of operators that torch.utils.flop_counter does not know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

Formula = Callable[..., int]
"""Takes the operator's arguments and `out_val`, what it returned; gives FLOPs, a multiply-add being two."""
CONVENTION = (
    "a multiply-add is two; attention is counted whole, masked or not, as in PaLM's MFU (arXiv 2204.02311); only "
    "matrix products, convolutions and attention have formulas"
)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> int:
    """Return 2·b·h·q·k·(d + d_v) of queries [b, h, q, d], keys [b, h or fewer, k, d] and values [b, …, k, d_v].

    The scores and their product with the values, each a matrix product; a mask saves nothing, heads that share keys
    count in full. This is torch's formula (sdpa_flop_count), written out as older ones refuse shared keys.
    """
    batch, heads, queries, width = query.shape[-4:] if query.dim() > 3 else (1, *query.shape[-3:])
    return 2 * batch * heads * queries * key.shape[-2] * (width + value.shape[-1])


def matrix_vector(matrix: torch.Tensor, *_: Any, **__: Any) -> int:
    """Return 2·m·k of a matrix [m, k] times a vector."""
    return 2 * matrix.numel()


def added_matrix_vector(_: torch.Tensor, matrix: torch.Tensor, *__: Any, **___: Any) -> int:
    """Return 2·m·k of a matrix [m, k] times a vector, added to another."""
    return 2 * matrix.numel()


def product(left: torch.Tensor, _: Any, *__: Any, out_val: Any, **___: Any) -> int:
    """Return 2·k for each element of what a product of matrices returned, whose left one is […, k]."""
    return 2 * int(out_val.numel()) * int(left.shape[-1])


def added_product(_: Any, left: torch.Tensor, *__: Any, out_val: Any, **___: Any) -> int:
    """Return 2·k for each element of what a product, added to a first argument, returned."""
    return 2 * int(out_val.numel()) * int(left.shape[-1])


def added_batches(_: Any, left: torch.Tensor, *__: Any, out_val: Any, **___: Any) -> int:
    """Return 2·b·k for each element of a sum of b products of matrices [b, m, k]."""
    return 2 * int(out_val.numel()) * int(left.shape[0]) * int(left.shape[-1])


OURS: Mapping[str, Formula] = {
    **dict.fromkeys(
        (
            *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_fused_attention_overrideable"),
            *("_scaled_dot_product_attention_math_for_mps", "_scaled_dot_product_flash_attention"),
            *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
        ),
        attention,
    ),
    **dict.fromkeys(("mv", "dot", "vdot"), matrix_vector),
    "addmv": added_matrix_vector,
    **dict.fromkeys(
        ("_int_mm", "_grouped_mm", "_scaled_grouped_mm", "_weight_int8pack_mm", "_weight_int4pack_mm", "mkldnn_linear"),
        product,
    ),
    "_addmm_activation": added_product,
    "addbmm": added_batches,
}
"""Formulas by name in torch.ops.aten: gaps of FlopCounterMode (torch 2.13), which counts these as nothing."""


def known() -> dict[Any, Formula]:
    """Return every operator that has a formula, with it: torch's, and OURS where torch has none or a narrower one."""
    ours = {getattr(torch.ops.aten, name): formula for name, formula in OURS.items() if hasattr(torch.ops.aten, name)}
    return {**flop_registry, **ours}


def gaps(names: Sequence[str] = tuple(OURS)) -> list[str]:
    """Return those of `names` that this torch has and its FlopCounterMode counts as nothing."""
    there = [name for name in names if hasattr(torch.ops.aten, name)]
    return [name for name in there if getattr(torch.ops.aten, name) not in flop_registry]
