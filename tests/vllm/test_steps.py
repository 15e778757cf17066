"""What a step's batch becomes, and one layer's attention of it."""

from itertools import pairwise

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import registry
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec

import blasst
from blasst.errors import NotSupportedError
from blasst.integrations import vllm as plugin
from blasst.integrations.vllm.attention import Attention
from blasst.integrations.vllm.backend import Backend
from blasst.integrations.vllm.metadata import Builder, Metadata
from blasst.integrations.vllm.thresholds import PhaseThresholds
from engines import make_engine  # noqa: F401, sets the environment before vLLM is imported

NAME, KEYS = "model.layers.0.self_attn.attn", 4096


def builder(*, on_cpu: bool, threshold: int) -> Builder:
    """Without an engine around it, dense."""
    made = object.__new__(Builder)
    dense = PhaseThresholds(None, {NAME: 0}, max_requests=8, by_request=False, device=None)
    made._thresholds = dict.fromkeys(("prefill", "decode"), dense)
    made._scores = {phase: {NAME: "exact"} for phase in ("prefill", "decode")}
    made._statistics = made._requests = None
    made._on_cpu, made._most_keys, made.reorder_batch_threshold = on_cpu, KEYS, threshold
    made.device, made._widens, made._block_size = torch.device("cpu"), False, 16
    return made


def batch(queries: list[int], keys: list[int], **changes) -> CommonAttentionMetadata:
    """Of requests with so many tokens in this step, and keys; pages of 16 tokens, in a row."""
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0)], dtype=torch.int32)
    tables = torch.arange(len(keys) * 32, dtype=torch.int32).reshape(len(keys), 32)
    options = {
        "query_start_loc": starts,
        "query_start_loc_cpu": starts,
        "seq_lens": torch.tensor(keys, dtype=torch.int32),
        "num_reqs": len(queries),
        "num_actual_tokens": sum(queries),
        "max_query_len": max(queries),
        "max_seq_len": max(keys),
        "block_table_tensor": tables,
        "slot_mapping": torch.arange(sum(queries)),
        "causal": True,
    }
    return CommonAttentionMetadata(**options | changes)


def test_decodes_come_first():
    made = builder(on_cpu=True, threshold=1).build(0, batch([1, 1, 40, 7], [9, 300, 40, 20]))
    decode, prefill = made.parts
    assert (decode.phase, decode.tokens, decode.positions) == ("decode", slice(0, 2), 1)
    assert (prefill.phase, prefill.tokens, prefill.positions) == ("prefill", slice(2, 49), None)
    assert prefill.places["cu_seqlens_q"].tolist() == [0, 40, 47]
    assert prefill.places["max_seqlen_q"] == 40
    assert prefill.places["lengths"].tolist() == [40, 20]


@pytest.mark.parametrize("on_cpu", [True, False])
def test_numbers_of_drafts_may_differ(on_cpu):
    made = builder(on_cpu=on_cpu, threshold=5)
    decode, prefill = made.build(0, batch([4, 1, 3, 0, 9], [50, 60, 70, 9, 9])).parts
    assert (decode.phase, decode.positions, decode.tokens) == ("decode", None, slice(0, 8))
    assert decode.places["cu_seqlens_q"].tolist() == [0, 4, 5, 8, 8]
    assert decode.places["max_seqlen_q"] == 5, "whatever the others have"
    assert decode.places["lengths"].tolist() == [50, 60, 70, 9]
    assert (prefill.phase, prefill.tokens) == ("prefill", slice(8, 17))


@pytest.mark.parametrize("positions", [1, 3])
def test_a_graph_is_for_padded_batches_and_the_longest_request(positions):
    padded = batch([positions, positions, 0, 0], [50, 60, 0, 0], num_actual_tokens=4 * positions)
    [decode] = builder(on_cpu=False, threshold=positions).build(0, padded).parts
    assert (decode.tokens, decode.positions) == (slice(0, 4 * positions), positions)
    assert decode.places["max_seqlen_k"] == KEYS
    assert decode.places["lengths"].tolist() == [50, 60, 0, 0]


@pytest.mark.parametrize("change", [{"causal": False}, {"rswa_prefix_lens": torch.zeros(1)}])
def test_batches_that_are_refused(change):
    with pytest.raises(NotSupportedError, match=r"not causal|with rswa_prefix_lens"):
        builder(on_cpu=True, threshold=1).build(0, batch([3], [3], **change))


def test_a_layer_that_attends_in_chunks_is_refused():
    """vLLM derives its builder from ours, and gives it chunks in the place of requests."""
    spec = ChunkedLocalAttentionSpec(
        block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32, attention_chunk_size=64
    )
    with pytest.raises(NotSupportedError, match=r"layers\.0\.self_attn\.attn attends in chunks"):
        Builder(spec, [NAME], VllmConfig(), torch.device("cpu"))


def test_gpus_and_sizes_are_those_of_the_kernels():
    for capability, is_fit in (((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)):
        assert Backend.supports_compute_capability(DeviceCapability(*capability)) == is_fit
    for size in Backend.get_supported_head_sizes():
        for phase in ("prefill", "decode"):
            numbers = {"heads": 4, "kv_heads": 1, "head_dim": size, "batch": 1, "keys": 64}
            blasst.workspace_bytes(phase, "cuda", torch.bfloat16, **numbers)


@pytest.mark.parametrize(
    ("on_cpu", "queries", "keys"),
    [(True, [1, 40, 7], [300, 40, 20]), (False, [4, 1, 4, 39], [300, 40, 20, 50])],
)
def test_sinks_window_and_soft_cap_of_a_layer(on_cpu, queries, keys):
    torch.manual_seed(0)
    q = torch.randn(48, 4, 32)
    cache = torch.randn(32 * len(keys), 2, 16, 64)
    k, v = cache.transpose(1, 2).split(32, -1)
    sinks = torch.randn(4)
    with set_current_vllm_config(VllmConfig()):
        layer = Attention(
            4, 32, 0.2, 2, sliding_window=25, logits_soft_cap=5.0, sinks=sinks.bfloat16()
        )
    layer.process_weights_after_loading(torch.float32)
    threshold = 1 if on_cpu else 4
    step: Metadata = builder(on_cpu=on_cpu, threshold=threshold).build(0, batch(queries, keys))
    out = torch.empty_like(q)
    named = torch.nn.Identity()
    named.layer_name = NAME
    assert layer.forward(named, q, q, q, cache, step, out) is out
    ends = [0, *torch.tensor(queries).cumsum(0).tolist()]
    for i, (start, stop) in enumerate(pairwise(ends)):
        wanted = blasst.attention(
            q[None, start:stop],
            *(t[i * 32 : i * 32 + 32].flatten(0, 1)[None, : keys[i]] for t in (k, v)),
            phase="decode" if stop - start <= threshold else "prefill",
            causal=True,
            scale=0.2,
            window=(24, None),
            softcap=5.0,
            sinks=sinks.bfloat16(),
        )
        assert torch.equal(out[start:stop], wanted[0])


def test_an_unknown_version_is_refused_when_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(plugin, "version", lambda name: "0.99.0")
    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", {})
    plugin.register()
    with pytest.raises(ImportError, match=r"vllm 0\.99\.0 is installed; blasst serves vllm 0\.26"):
        registry.AttentionBackendEnum.CUSTOM.get_class()
    assert registry.AttentionBackendEnum.CPU_ATTN.get_class().__module__.startswith("vllm.")


@pytest.mark.parametrize("widens", [False, True])
def test_a_cache_in_8_bits(monkeypatch, widens):
    """Written by steps, read by kernels or widened, where the buffer takes two prompts at once."""
    torch.manual_seed(0)
    queries, keys = [1, 40, 7, 30], [300, 40, 20, 30]
    starts = [0, 1, 41, 48, 78]
    cache = torch.zeros(32 * len(keys), 2, 16, 64, dtype=torch.uint8)
    with set_current_vllm_config(VllmConfig()):
        attention = Attention(4, 32, 0.2, 2, kv_cache_dtype="fp8")
    layer = torch.nn.Identity()
    layer.layer_name = NAME
    for name, scale in (("k", 0.03), ("v", 0.5)):
        setattr(layer, f"_{name}_scale", torch.tensor(scale))
        setattr(layer, f"_{name}_scale_float", scale)
    given = (
        torch.randn(2, len(keys), max(keys), 2, 32)
        * torch.tensor([1.0, 30.0])[:, None, None, None, None]
    )
    for i, number in enumerate(keys):
        slots = torch.arange(number) + i * 512
        attention.do_kv_cache_update(layer, *given[:, i, :number], cache, slots)
    stored = [
        (given[i] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        for i, scale in enumerate((0.03, 0.5))
    ]

    made = builder(on_cpu=True, threshold=1)
    if widens:
        made._widens, made._most_keys = True, 64
        wide = torch.full((8 * 2 * 16 * 64,), torch.nan)
        monkeypatch.setattr(attention, "_room", lambda _: ({}, wide))
    lengths = torch.tensor(keys, dtype=torch.int32)
    step = made.build(0, batch(queries, keys, seq_lens_cpu_upper_bound=lengths))
    assert len(step.parts) == (3 if widens else 2)
    q = torch.randn(78, 4, 32)
    out = attention.forward(layer, q, q, q, cache, step, torch.empty_like(q))
    for i, (start, stop) in enumerate(pairwise(starts)):
        k, v = (t[None, i, : keys[i]] for t in stored)
        phase = "decode" if queries[i] == 1 else "prefill"
        wanted = blasst.attention(q[None, start:stop], k, v, phase=phase, causal=True, scale=0.2)
        torch.testing.assert_close(out[start:stop], wanted[0], rtol=1e-5, atol=1e-4)
