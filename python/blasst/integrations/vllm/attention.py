"""The attention of one layer, as vLLM calls it."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType
from vllm.v1.worker.workspace import current_workspace_manager

from blasst.errors import NotSupportedError
from blasst.integrations.vllm.limits import check_layer, most_positions
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
    dtype: torch.dtype, shape: tuple[int, int, int], requests: int, positions: int, keys: int
) -> int:
    """Bytes of workspace that a layer's calls may need on a GPU, with exact scores.

    Args:
        dtype: of queries.
        shape: heads, kv_heads and head_dim.
        requests: the most of a step.
        positions: the most of a request in a decode step.
        keys: the most of a request.
    """
    heads, kv_heads, head_dim = shape
    positions = min(positions, most_positions(heads // kv_heads, on_cpu=False))
    numbers = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "keys": keys}
    return max(
        workspace_bytes(phase, "cuda", dtype, **numbers, batch=requests, query_length=rows)
        for phase, rows in (("prefill", keys), ("decode", positions))
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
        self._workspace_bytes = 0
        if not current_platform.is_cpu():
            config = get_current_vllm_config()
            drafts = getattr(config.speculative_config, "num_speculative_tokens", None) or 0
            self._workspace_bytes = workspace_of(
                torch.get_default_dtype(),
                (num_heads, self.num_kv_heads, head_size),
                config.scheduler_config.max_num_seqs,
                1 + drafts,
                config.model_config.max_model_len,
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
        workspace = self._workspace()
        if attn_metadata is None:  # memory is being measured, or the model compiled
            return output.fill_(0)
        k, v = self._pages(kv_cache)
        for part in attn_metadata.parts:
            q, out = query[part.tokens], output[part.tokens]
            if part.positions is not None:
                by_request = (-1, part.positions)
                q, out = q.unflatten(0, by_request), out.unflatten(0, by_request)
            tensors = {"out": out, "q": q, "k": k, "v": v}
            if part.scores[layer.layer_name] == "exact":  # bytes of keys have no bound worth taking
                tensors |= workspace
            statistics = attn_metadata.statistics
            tiles = self._attend(layer.layer_name, part, tensors, statistics is not None)
            if statistics is not None:
                statistics.add(part.phase, layer.layer_name, tiles)
        return output

    def _attend(
        self, name: str, part: Part, tensors: dict[str, Tensor], want_tiles: bool
    ) -> Tensor | None:
        """Attention of one phase's requests; their tiles, if they are counted."""
        reports = call(
            f"{part.phase}_into",
            **tensors,
            **dict.fromkeys(_PLACES) | part.places,
            **{"scale": self.scale, "softcap": self._softcap, "sinks": self.sinks},
            **self._mask,
            **part.decision.of_layer(name, self.num_heads),
            **{f"want_{report}": report == "tiles" and want_tiles for report in REPORTS},
            scores=part.scores[name],
        )
        return dict(zip(REPORTS, reports, strict=True))["tiles"]

    def _workspace(self) -> dict[str, Tensor]:
        """vLLM's, which all layers share and which it makes room for when it measures memory."""
        if not self._workspace_bytes:
            return {}
        manager = current_workspace_manager()
        [workspace] = manager.get_simultaneous(((self._workspace_bytes,), torch.uint8))
        return {"workspace": workspace}

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
        k[page, offset], v[page, offset] = key[tokens][is_token], value[tokens][is_token]

    def _pages(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each [blocks, block_size, kv_heads, head_size], of a layer's cache."""
        return kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
