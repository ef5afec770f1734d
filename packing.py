"""Packed batches: sequences end to end in one row of tokens, and the attention of that layout.

There is no padding, a sequence's last token, which predicts none, is left out, and so is a prefix that the sequence
before has as well (a group's prompt). "abcde.", "abcxy." and "mn." become

    tokens    a b c d e | x y | m n              cu_q = [0, 5, 7, 9]
    keys      a b c d e | a b c x y | m n        cu_k = [0, 5, 10, 12]    what a sequence's tokens attend to
    source    0 1 2 3 4 | 0 1 2 5 6 | 7 8                                 where among the tokens each key stands

A model that can't take them gets padded batches, with the same log-probs and gradients; `try_packing` finds out.
"""

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from chat import UserError, shared_prefix

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


def loop_of_sdpa(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *_: int, scale: Any, window_size: tuple[int, int]
) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` computes, one sequence after the other, on any device.

    q: (tokens, heads, D), k and v: (keys, heads, D). A token sees itself and the `window_size[0]` keys before; -1: all.
    """
    outputs, bounds_q, bounds_k = [], cu_q.tolist(), cu_k.tolist()
    for n in range(len(bounds_q) - 1):
        tokens, keys = slice(*bounds_q[n : n + 2]), slice(*bounds_k[n : n + 2])
        query, key, value = (t.transpose(0, 1)[None] for t in (q[tokens], k[keys], v[keys]))  # (1, heads, own, D)
        shared, window = key.shape[2] - query.shape[2], window_size[0]
        mask = None  # plainly causal
        if shared or window >= 0:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=q.device).tril(shared)
            mask = mask.triu(shared - window) if window >= 0 else mask
        options: Any = {"attn_mask": mask, "is_causal": mask is None, "scale": scale, "enable_gqa": True}
        outputs.append(scaled_dot_product_attention(query, key, value, **options)[0].transpose(0, 1))
    return torch.cat(outputs)


def pick_kernel(attn: str, device: torch.device, dtype: torch.dtype) -> tuple[Callable[..., Any], str]:
    """The first of three ways to compute it that can run, and its name: flash-attn, PyTorch's own kernel, the loop."""
    fast = device.type == "cuda" and dtype == torch.bfloat16
    has_flash = fast and importlib.util.find_spec("flash_attn") is not None
    if attn == "flash_attention_2" and not has_flash:
        words = "needs a GPU, bf16 and the package flash-attn; auto takes what it finds"
        raise UserError(f"--attn flash_attention_2 {words}")
    if attn == "sdpa" or not fast:
        return loop_of_sdpa, "sdpa"
    if has_flash:
        flash: Any = importlib.import_module("flash_attn").flash_attn_varlen_func
        return lambda *args, scale, **options: flash(*args, softmax_scale=scale, causal=True, **options), "flash-attn"
    options = {"enable_gqa": True} if TORCH >= (2, 12) else {}  # before, fewer heads of keys than of queries just work
    return functools.partial(importlib.import_module("torch.nn.attention.varlen").varlen_attn, **options), "varlen_attn"


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention for transformers, (1, heads, tokens, D) each; of batches that are not packed, the library's own."""
    if "packing" not in options:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    kernel, dtype, source, lengths = options["packing"]
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # (tokens, heads, D)
    if source is not None:
        # Backward adds up the gradients of a shared prefix: in float32, and by index_select always in the same order.
        k, v = (t.to(torch.promote_types(t.dtype, torch.float32)).index_select(0, source) for t in (k, v))
    if dtype == torch.bfloat16:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    window = (options.get("sliding_window") or 0) - 1
    return kernel(q, k, v, *lengths, scale=options.get("scaling"), window_size=(window, 0))[None], None


def pack(input_ids: Tensor, loss_mask: Tensor) -> tuple[dict[str, Any], tuple[Tensor | None, list], Tensor]:
    """Right-padded sequences, (B, T), packed, without what follows the last trained token of each.

    Returns the model's inputs; `source` (None where nothing is shared) with cu_q, cu_k and the longest of q and of k;
    and where among the packed tokens each token of the batch stands, (B, T).
    """
    width, device = input_ids.shape[1], input_ids.device
    ends = (loss_mask * torch.arange(width, device=device)).amax(1).clamp(min=1)  # the last token predicts nothing
    tokens, positions, source, where, cu_q, cu_k = [], [], [], [], [0], [0]
    before, keys = [], []
    for row, end in zip(input_ids.tolist(), ends.tolist(), strict=True):
        shared = shared_prefix(before, row[: end - 1])  # at least one token is its own
        keys = [*keys[:shared], *range(len(tokens), len(tokens) + end - shared)]
        before = row[:end]
        tokens += row[shared:end]
        positions += range(shared, end)
        source += keys
        where.append(keys + [0] * (width - end))
        cu_q.append(len(tokens))
        cu_k.append(len(source))
    tensors = [torch.tensor(t, device=device) for t in ([tokens], [positions], source, where, cu_q, cu_k)]
    lengths = [cu.int() for cu in tensors[4:]] + [int(cu.diff().max()) for cu in tensors[4:]]
    # The library makes no mask of its own where it gets one of four dimensions; nobody looks at this one.
    inputs = {"input_ids": tensors[0], "position_ids": tensors[1], "attention_mask": torch.ones(1, 1, 1, 1)}
    return inputs, (tensors[2] if len(source) > len(tokens) else None, lengths), tensors[3]


@torch.no_grad()
def try_packing(lm: Any, kernel: Callable[..., Tensor]) -> bool:
    """Makes `packed_attention` the model's, if packed sequences then get the logits that padded ones do.

    Not where layers mix neighbours (recurrent ones), nor where a window is applied by a mask only: windows are cut
    to two tokens here, so that eight show them.
    """
    config, error = lm.model.config.get_text_config(), math.inf
    if set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}:
        return False
    rows = [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 8, 7, 6, 5], [9, 8, 7, 1, 2, 3, 5, 4]]
    ids = torch.tensor(rows, device=lm.model.device)
    inputs = (ids, torch.ones_like(ids), torch.ones_like(ids), 1.0, lambda logits, _targets: (logits,))
    parts = [part for part in (config, *lm.model.modules()) if getattr(part, "sliding_window", 0)]
    windows, before = [part.sliding_window for part in parts], lm.model.config._attn_implementation
    transformers.AttentionInterface.register("packed", packed_attention)
    AttentionMaskInterface.register("packed", sdpa_mask)
    try:
        for part in parts:
            part.sliding_window = 2
        (expected,) = lm(*inputs)
        lm.model.set_attn_implementation("packed")
        lm.kernel = kernel
        error = (lm(*inputs)[0] - expected).norm() / expected.norm()
    except (TypeError, ValueError, RuntimeError, KeyError):  # it hands `packing` to no attention function
        pass
    for part, window in zip(parts, windows, strict=True):
        part.sliding_window = window
    packs = bool(error < (0.2 if lm.dtype == torch.bfloat16 else 1e-3))
    if not packs:
        lm.kernel = None
        lm.model.set_attn_implementation(before)
    return packs
