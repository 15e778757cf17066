"""What the backend does not do, in a sentence each."""

from typing import Any

from blasst.errors import NotSupportedError
from blasst.integrations.vllm import eight_bit

CUDA_HEAD_SIZES = (64, 96, 128, 256)
EIGHT_BIT_HEAD_SIZE = 128
CPU_HEAD_SIZES = tuple(range(16, 577, 8))
BLOCK_SIZES = (16, 32, 64, 128, 256)
FAST_BLOCK_SIZE = 64
"""From which on pages cost a GPU nothing: of 16 tokens, prefill takes twice as long."""
CACHE_DTYPES = ("auto", "float16", "bfloat16", *eight_bit.NAMES)
MOST_POSITIONS = 16
"""That a request may have in a decode step."""
MOST_ROWS = 64
"""That the query heads of a KV head may have together in a decode step on a GPU."""


def check_layer(
    *,
    on_cpu: bool,
    head_size: int,
    attn_type: str,
    alibi_slopes: Any,
    kv_cache_dtype: str,
    others: dict[str, Any],
) -> None:
    """An error unless the backend does such a layer; vLLM's CPU platform asks nobody before.

    Raises:
        NotSupportedError: it does not.
    """
    sizes = CPU_HEAD_SIZES if on_cpu else CUDA_HEAD_SIZES
    if head_size not in sizes:
        accepted = "a multiple of 8 from 16 to 576" if on_cpu else "64, 96, 128 or 256"
        raise NotSupportedError(f"blasst: head size {head_size}; it must be {accepted}")
    if attn_type != "decoder":
        raise NotSupportedError(
            f"blasst: a layer of {attn_type} attention; only decoder layers are supported"
        )
    if alibi_slopes is not None:
        raise NotSupportedError("blasst: a layer with ALiBi slopes, which no kernel adds")
    if kv_cache_dtype not in CACHE_DTYPES:
        raise NotSupportedError(
            f"blasst: a cache of {kv_cache_dtype}; --kv-cache-dtype must be one of "
            f"{', '.join(CACHE_DTYPES)}"
        )
    if kv_cache_dtype in eight_bit.NAMES and not on_cpu and head_size != EIGHT_BIT_HEAD_SIZE:
        raise NotSupportedError(
            f"blasst: a cache of {kv_cache_dtype} with head size {head_size}; on a GPU it must be "
            f"{EIGHT_BIT_HEAD_SIZE}"
        )
    if unknown := sorted(name for name, value in others.items() if value not in (None, False, -1)):
        raise NotSupportedError(f"blasst: a layer with {', '.join(unknown)}, which no kernel does")


def most_positions(group: int, *, on_cpu: bool) -> int:
    """Of a request in a decode step, where `group` query heads share a KV head."""
    return MOST_POSITIONS if on_cpu else max(1, min(MOST_POSITIONS, MOST_ROWS // group))
