"""What the layers of a KV cache group need to know of a step's batch."""

import logging
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from vllm import envs
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from blasst.config import PHASES
from blasst.errors import NotSupportedError
from blasst.integrations.vllm import eight_bit
from blasst.integrations.vllm.limits import FAST_BLOCK_SIZE, most_positions
from blasst.integrations.vllm.options import REQUESTS, options_of, passes_requests_on
from blasst.integrations.vllm.requests import Requests
from blasst.integrations.vllm.statistics import Statistics
from blasst.integrations.vllm.thresholds import (
    Decision,
    Layer,
    PhaseThresholds,
    Share,
    calibration_of,
    thresholds_of,
)

_log = logging.getLogger("vllm.blasst")
HOST_LENGTHS = "seq_lens_cpu_upper_bound"
"""Of CommonAttentionMetadata: how many keys each request has; just so many in prefill."""


@dataclass
class Part:
    """Requests of one phase, attention of which is one call."""

    phase: str
    tokens: slice
    """Of the batch."""
    places: dict[str, Any]
    """Where queries and keys are, as the operator takes it."""
    positions: int | None
    """Of each request, if all have as many, but for some at the end that pad the batch; None:
    ragged."""
    decision: Decision
    scores: dict[str, str]
    pages: Tensor | None = None
    """[pages] int64 of a cache in 8 bits, to be widened; the page table is of these then."""


@dataclass
class Metadata:
    """A step's batch: decodes, then prefills."""

    parts: list[Part]
    statistics: Statistics | None


class Builder(AttentionMetadataBuilder[Metadata]):
    """Describes batches to the layers of one KV cache group."""

    _cudagraph_support: ClassVar = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        _check_layers(kv_cache_spec, layer_names[0], vllm_config)
        modules = vllm_config.compilation_config.static_forward_context
        attentions = [modules[name] for name in layer_names]
        self._layers = [
            Layer(name, layer.num_heads, layer.head_size)
            for name, layer in zip(layer_names, attentions, strict=True)
        ]
        self._on_cpu = torch.device(device).type == "cpu"
        group = max(layer.num_heads // layer.num_kv_heads for layer in attentions)
        most = most_positions(group, on_cpu=self._on_cpu)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        if (positions := self.reorder_batch_threshold) > most:
            _say_once(
                f"drafts make up to {positions} positions of a request, decode does {most} where "
                f"{group} query heads share a KV head: requests with more are prefills, with their "
                "thresholds"
            )
        self.reorder_batch_threshold = min(positions, most)
        self._most_keys = vllm_config.model_config.max_model_len
        self._block_size = kv_cache_spec.block_size
        if not self._on_cpu and self._block_size < FAST_BLOCK_SIZE:
            _say_once(
                f"blocks of {self._block_size} tokens make blasst's prefill up to twice as long; "
                f"--block-size {FAST_BLOCK_SIZE} or none costs nothing"
            )
        is_8_bit = attentions[0].kv_cache_dtype in eight_bit.NAMES
        self._widens = is_8_bit and not self._on_cpu
        if self._widens and HOST_LENGTHS not in {f.name for f in fields(CommonAttentionMetadata)}:
            raise NotSupportedError(
                "blasst: a cache in 8 bits in this vLLM, which does not tell the host how long "
                "prompts are; newer ones do"
            )
        self._requests = Requests.of(vllm_config)
        if passes_requests_on(vllm_config.model_config.logits_processors):
            _check_requests(self._requests)
        self._set_thresholds()

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> Any:
        """Graphs of decode, with all positions that drafts make if the kernel does so many."""
        config, drafts = vllm_config.model_config, vllm_config.speculative_config
        heads = config.get_num_attention_heads(vllm_config.parallel_config)
        most = most_positions(heads // kv_cache_spec.num_kv_heads, on_cpu=False)
        if drafts is not None and 1 + (drafts.num_speculative_tokens or 0) > most:
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.UNIFORM_BATCH

    def _set_thresholds(self) -> None:
        config = self.vllm_config
        options = options_of(config.additional_config)
        calibration = calibration_of(config.model_config, options)
        share = Share(get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())
        found = {
            phase: thresholds_of(
                phase,
                self._layers,
                options,
                calibration,
                share,
                device=self.device,
                dtype=config.model_config.dtype,
            )
            for phase in PHASES
        }
        self._scores = {phase: one.scores for phase, one in found.items()}
        self._thresholds = {
            phase: PhaseThresholds(
                one.source,
                one.rows,
                max_requests=config.scheduler_config.max_num_seqs,
                by_request=self._requests is not None,
                device=self.device,
            )
            for phase, one in found.items()
        }
        self._statistics = None
        if options.statistics:
            interval = envs.VLLM_LOG_STATS_INTERVAL
            self._statistics = Statistics(self.layer_names, self.device, interval)
        if calibration is None and not options.thresholds:
            _say_once(
                f"{config.model_config.model} has no sparse_attention_config and additional_config "
                "gives no thresholds: blasst computes every tile"
                + ("" if self._requests is None else ", but for requests that ask otherwise")
            )
        elif (
            self._requests is None
            and config.scheduler_config.enable_chunked_prefill
            and not getattr(found["prefill"].source, "is_same_for_all_lengths", True)
        ):
            _say_once(
                "thresholds of a prompt that is read in chunks go by its length so far; with "
                f"--logits-processors {REQUESTS} they go by the whole"
            )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Metadata:
        """A batch as the layers need it. See vLLM's `AttentionMetadataBuilder`."""
        m = common_attn_metadata
        _check_batch(m)
        if self._statistics is not None:
            self._statistics.tell()
        decodes, prefills, *_ = split_decodes_and_prefills(
            m,
            decode_threshold=self.reorder_batch_threshold,
        )
        parts = []
        if decodes:
            parts.append(self._decode(m, slice(0, decodes)))
        if prefills:
            parts += self._prefills(m, slice(decodes, m.num_reqs))
        return Metadata(parts, self._statistics)

    def _decode(self, m: CommonAttentionMetadata, requests: slice) -> Part:
        """One call, ragged unless all requests have as many positions."""
        numbers = m.query_start_loc_cpu[: requests.stop + 1].diff()
        positions = int(numbers.max())
        others = numbers != positions
        if not self._on_cpu:
            others &= numbers > 0  # a graph's batch is padded with requests of none
        decision = self._decide("decode", m, requests)
        if others.any():
            return self._ragged("decode", m, requests, decision)
        tokens, places = slice(0, positions * requests.stop), self._places("decode", m, requests)
        return Part("decode", tokens, places, positions, decision, self._scores["decode"])

    def _places(self, phase: str, m: CommonAttentionMetadata, requests: slice) -> dict[str, Any]:
        # A graph of decode is captured once, for the longest that there may be.
        is_captured = phase == "decode" and not self._on_cpu
        return {
            "lengths": m.seq_lens[requests],
            "page_table": m.block_table_tensor[requests],
            "max_seqlen_k": self._most_keys if is_captured else m.max_seq_len,
        }

    def _prefills(self, m: CommonAttentionMetadata, requests: slice) -> list[Part]:
        """One call; where pages are widened, as many as the buffer makes necessary."""
        decision = self._decide("prefill", m, requests)
        if not self._widens:
            return [self._ragged("prefill", m, requests, decision)]
        pages = -(-getattr(m, HOST_LENGTHS)[requests].long() // self._block_size)
        parts = []
        for some in eight_bit.groups_of(pages.tolist(), -(-self._most_keys // self._block_size)):
            these = slice(requests.start + some.start, requests.start + some.stop)
            part = self._ragged("prefill", m, these, decision.of_requests(some))
            part.pages, table = eight_bit.pages_of(part.places["page_table"], pages[some])
            part.places["page_table"] = table
            parts.append(part)
        return parts

    def _ragged(
        self, phase: str, m: CommonAttentionMetadata, requests: slice, decision: Decision
    ) -> Part:
        starts = m.query_start_loc_cpu[requests.start : requests.stop + 1]
        first, last = int(starts[0]), int(starts[-1])
        on_device = m.query_start_loc[requests.start : requests.stop + 1]
        places = self._places(phase, m, requests)
        # Of a decode what any step may have, so that a request gets the same among any others.
        most = self.reorder_batch_threshold if phase == "decode" else int(starts.diff().max())
        places |= {"cu_seqlens_q": on_device - first, "max_seqlen_q": most}
        return Part(phase, slice(first, last), places, None, decision, self._scores[phase])

    def _decide(self, phase: str, m: CommonAttentionMetadata, requests: slice) -> Decision:
        lengths, longest, own = m.seq_lens[requests], m.max_seq_len, None
        if self._requests is not None:
            slots = _slots(m)[requests]
            own = self._on_device(torch.from_numpy(self._requests.thresholds[phase][slots]))
            if phase == "prefill":
                whole = self._requests.prompt_lengths[slots]
                longest = max(longest, int(whole.max(initial=0)))
                lengths = torch.maximum(lengths, self._on_device(torch.from_numpy(whole)))
        room = longest if phase == "prefill" or self._on_cpu else self._most_keys
        return self._thresholds[phase].decide(lengths, longest, room, own)

    def _on_device(self, host: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return host
        return host.pin_memory().to(self.device, non_blocking=True)


def _slots(m: CommonAttentionMetadata) -> np.ndarray:
    """Of each row of the batch, the slot that `Requests` keeps its request in."""
    by_row = getattr(m, "req_idx", None)
    rows = np.arange(m.num_reqs)
    if by_row is None:
        return rows
    rows[: len(by_row)] = by_row[: m.num_reqs]  # what pads a graph's batch is nobody's
    return rows


def _check_layers(kv_cache_spec: Any, first: str, vllm_config: VllmConfig) -> None:
    """An error for layers of which a builder that knows only their names would make something."""
    drafts = getattr(vllm_config.speculative_config, "attention_backend", None)
    if drafts is AttentionBackendEnum.CUSTOM:
        raise NotSupportedError(
            "blasst: CUSTOM as the attention_backend of drafts, which have thresholds from "
            "nowhere; without one in speculative_config they have vLLM's own attention"
        )
    if getattr(kv_cache_spec, "attention_chunk_size", None):
        raise NotSupportedError(
            f"blasst: {first} attends in chunks of its own, which no kernel does"
        )


def _check_batch(m: CommonAttentionMetadata) -> None:
    """An error for what vLLM's CPU platform lets through."""
    if m.causal is not True:
        raise NotSupportedError("blasst: a batch with attention that is not causal")
    for name in ("mm_req_doc_ranges", "rswa_prefix_lens", "dcp_local_seq_lens"):
        if getattr(m, name, None) is not None:
            raise NotSupportedError(f"blasst: a batch with {name}, which no kernel does")


def _check_requests(requests: Requests | None) -> None:
    """An error if this process does not hear of requests, or cannot tell whose a row is."""
    if requests is None:
        raise NotSupportedError(
            f"blasst: --logits-processors {REQUESTS} with pipeline parallelism, of whose stages "
            "only the last has logits processors"
        )
    known = {field.name for field in fields(CommonAttentionMetadata)}
    if requests.has_slots and "req_idx" not in known:
        raise NotSupportedError(
            f"blasst: --logits-processors {REQUESTS} in this vLLM's second model runner; set "
            "VLLM_USE_V2_MODEL_RUNNER=0"
        )


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _log.warning("%s", message)
