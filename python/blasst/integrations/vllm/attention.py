"""The attention of one layer, as vLLM calls it."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType
from vllm.v1.worker.workspace import current_workspace_manager

from blasst.errors import NotSupportedError
from blasst.integrations.vllm import eight_bit
from blasst.integrations.vllm.limits import BLOCK_SIZES, check_layer, most_positions
from blasst.integrations.vllm.metadata import Metadata, Part
from blasst.ops.library import REPORTS, call, workspace_bytes

_PLACES = (
    "starts",
    "lengths",
    "query_lengths",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "page_table",
    "max_seqlen_q",
    "max_seqlen_k",
)


@cache
def workspace_of(
    dtype: torch.dtype,
    cache: torch.dtype,
    shape: tuple[int, int, int],
    requests: int,
    positions: int,
    keys: int,
) -> int:
    """Bytes of workspace that a layer's calls may need on a GPU, with exact scores.

    Args:
        dtype: of queries.
        cache: of keys and values in decode.
        shape: heads, kv_heads and head_dim.
        requests: the most of a step.
        positions: the most of a request in a decode step.
        keys: the most of a request.
    """
    heads, kv_heads, head_dim = shape
    positions = min(positions, most_positions(heads // kv_heads, on_cpu=False))
    numbers = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "keys": keys}
    return max(
        workspace_bytes(
            phase,
            "cuda",
            dtype,
            **numbers,
            batch=requests,
            query_length=rows,
            k_dtype=of_cache,
            v_dtype=of_cache,
        )
        for phase, rows, of_cache in (("prefill", keys, dtype), ("decode", positions, cache))
    )


class Attention(AttentionImpl[Metadata]):
    """Queries of a batch against the pages of its requests."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **others: Any,
    ) -> None:
        from vllm.platforms import current_platform

        check_layer(
            on_cpu=current_platform.is_cpu(),
            head_size=head_size,
            attn_type=attn_type,
            alibi_slopes=alibi_slopes,
            kv_cache_dtype=kv_cache_dtype,
            others=others,
        )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.sinks = sinks
        self._mask = {
            "causal": True,
            "window_left": -1 if sliding_window is None else sliding_window - 1,
            "window_right": -1,
            "bands": None,
            "blocks": None,
        }
        self._softcap = logits_soft_cap or 0.0
        self._is_8_bit = kv_cache_dtype in eight_bit.NAMES
        self._workspace_bytes = self._most_keys = 0
        if not current_platform.is_cpu():
            config, dtype = get_current_vllm_config(), torch.get_default_dtype()
            self._most_keys = config.model_config.max_model_len
            drafts = getattr(config.speculative_config, "num_speculative_tokens", None) or 0
            if getattr(config.speculative_config, "parallel_drafting", False):
                drafts *= 2  # decodes are all requests with as many, as vLLM's builders count them
            self._workspace_bytes = workspace_of(
                dtype,
                eight_bit.TYPE if self._is_8_bit else dtype,
                (num_heads, self.num_kv_heads, head_size),
                config.scheduler_config.max_num_seqs,
                1 + drafts,
                self._most_keys,
            )

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Sinks as the operator takes them, once."""
        if self.sinks is not None:
            self.sinks = self.sinks.float()

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Metadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write to `output`, [tokens, heads, head_size], and return it."""
        if output_scale is not None or output_block_scale is not None:
            raise NotSupportedError("blasst: an output that is quantized by its attention")
        workspace, wide = self._room(query.dtype)
        if attn_metadata is None:  # memory is being measured, or the model compiled
            return output.fill_(0)
        for part in attn_metadata.parts:
            q, out = query[part.tokens], output[part.tokens]
            if part.positions is not None:
                by_request = (-1, part.positions)
                q, out = q.unflatten(0, by_request), out.unflatten(0, by_request)
            tensors = {"out": out, "q": q} | self._keys(layer, part.pages, kv_cache, wide)
            if part.scores[layer.layer_name] == "exact":  # bytes of keys have no bound worth taking
                tensors |= workspace
            statistics = attn_metadata.statistics
            tiles = self._attend(layer.layer_name, part, tensors, statistics is not None)
            if statistics is not None:
                statistics.add(part.phase, layer.layer_name, tiles)
            if part.pages is not None and layer._v_scale_float != 1:
                out.mul_(layer._v_scale_float)
        return output

    def _attend(
        self, name: str, part: Part, tensors: dict[str, Any], want_tiles: bool
    ) -> Tensor | None:
        """Attention of one phase's requests; their tiles, if they are counted."""
        reports = call(
            f"{part.phase}_into",
            **tensors,
            **dict.fromkeys(_PLACES) | part.places,
            **{"softcap": self._softcap, "sinks": self.sinks},
            **self._mask,
            **part.decision.of_layer(name, self.num_heads),
            **{f"want_{report}": report == "tiles" and want_tiles for report in REPORTS},
            scores=part.scores[name],
        )
        return dict(zip(REPORTS, reports, strict=True))["tiles"]

    def _room(self, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor | None]:
        """A workspace, and where pages in 8 bits are widened.

        It is vLLM's, which all layers share and which it makes room for when it measures memory.
        """
        if not self._workspace_bytes:
            return {}, None
        most = (self._most_keys + BLOCK_SIZES[-1]) * self.num_kv_heads * 2 * self.head_size
        workspace, wide = current_workspace_manager().get_simultaneous(
            ((self._workspace_bytes,), torch.uint8), ((most * self._is_8_bit,), dtype)
        )
        return {"workspace": workspace}, wide

    def _keys(
        self, layer: torch.nn.Module, pages: Tensor | None, kv_cache: Tensor, wide: Tensor | None
    ) -> dict[str, Any]:
        """Keys and values as the operator takes them, with the scale of their scores."""
        scale, scales = self.scale, {}
        if pages is not None:
            page = kv_cache.shape[1:]
            into = wide[: len(pages) * page.numel()].view(-1, *page)
            kv_cache = eight_bit.widen(kv_cache, pages, into)
            scale *= layer._k_scale_float  # and v's goes to the result: both are exact so
        elif self._is_8_bit:
            kv_cache = kv_cache.view(eight_bit.TYPE)
            scales = {f"{name}_scale": getattr(layer, f"_{name}_scale") for name in "kv"}
            scales = {name: value.float().reshape(1, -1) for name, value in scales.items()}
        k, v = self._pages(kv_cache)
        return {"k": k, "v": v, "scale": scale} | scales

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """Write a step's keys and values, [tokens, kv_heads, head_size], to their pages."""
        if kv_cache.numel() == 0:
            return
        k, v = self._pages(kv_cache)
        if kv_cache.is_cuda:
            from vllm import _custom_ops

            _custom_ops.reshape_and_cache_flash(
                key, value, k, v, slot_mapping, self.kv_cache_dtype, layer._k_scale, layer._v_scale
            )
            return
        is_token = slot_mapping >= 0
        slots = slot_mapping[is_token].long()
        page, offset = slots // k.shape[1], slots % k.shape[1]
        tokens = slice(0, len(slot_mapping))
        key, value = key[tokens][is_token], value[tokens][is_token]
        if self._is_8_bit:
            key = eight_bit.narrow(key, layer._k_scale)
            value = eight_bit.narrow(value, layer._v_scale)
        k[page, offset], v[page, offset] = key, value

    def _pages(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each [blocks, block_size, kv_heads, head_size], of a layer's cache."""
        return kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
