"""What vLLM asks of an attention backend before it builds one."""

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, MultipleOf

from blasst.integrations.vllm.attention import Attention
from blasst.integrations.vllm.limits import (
    BLOCK_SIZES,
    CACHE_DTYPES,
    CPU_HEAD_SIZES,
    CUDA_HEAD_SIZES,
    FAST_BLOCK_SIZE,
)
from blasst.integrations.vllm.metadata import Builder


class Backend(AttentionBackend):
    """On a GPU of compute capability 8.0 or later."""

    supported_dtypes: ClassVar = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar = list(CACHE_DTYPES)
    forward_includes_kv_cache_update: bool = False

    @staticmethod
    def get_name() -> str:
        """A member of vLLM's enumeration of backends."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Attention]:
        """What a layer calls."""
        return Attention

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        """What describes each step's batch to the layers."""
        return Builder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Tokens in a page of the cache."""
        return list(BLOCK_SIZES)

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Where no `--block-size` is given."""
        return max(default_block_size, FAST_BLOCK_SIZE)

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Of queries, keys and values."""
        return list(CUDA_HEAD_SIZES)

    @classmethod
    def supports_sink(cls) -> bool:
        """A logit of each head joins the denominator."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """A layer may see the last keys only."""
        return True

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """Of the GPU."""
        return capability.major >= 8

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Steps are planned by what the host knows of their lengths."""
        return False

    # vLLM 0.26 asks for the shape of the cache; later versions build it themselves, and it is
    # the same: keys and values of a token and head side by side.
    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """[blocks, kv_heads, block_size, 2 * head_size]."""
        return num_blocks, num_kv_heads, block_size, 2 * head_size

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """In which order its dimensions lie in memory: tokens before heads, where vLLM asks so."""
        from vllm.v1.attention.backends.utils import get_kv_cache_layout

        tokens_first = get_kv_cache_layout() == "NHD"
        if include_num_layers_dimension:
            return (1, 0, 3, 2, 4) if tokens_first else (1, 2, 0, 3, 4)
        return (0, 2, 1, 3) if tokens_first else (0, 1, 2, 3)


class CpuBackend(Backend):
    """On a CPU."""

    supported_dtypes: ClassVar = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Tokens in a page of the cache."""
        return [MultipleOf(16)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Of queries, keys and values."""
        return list(CPU_HEAD_SIZES)
