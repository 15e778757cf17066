"""What a step's batch becomes, and one layer's attention of it."""

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import registry

import blasst
from blasst.errors import NotSupportedError
from blasst.integrations import vllm as plugin
from blasst.integrations.vllm.attention import Attention
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


def test_numbers_of_drafts_may_differ_on_a_cpu():
    [decode] = builder(on_cpu=True, threshold=4).build(0, batch([4, 1, 3], [50, 60, 70])).parts
    assert (decode.phase, decode.positions) == ("decode", None)
    assert decode.places["cu_seqlens_q"].tolist() == [0, 4, 5, 8]
    decode, prefill = builder(on_cpu=False, threshold=4).build(0, batch([4, 1], [50, 60])).parts
    assert (decode.tokens, decode.positions, prefill.tokens) == (slice(0, 4), 4, slice(4, 5))


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


def test_sinks_window_and_soft_cap_of_a_layer():
    torch.manual_seed(0)
    queries, keys = [1, 40, 7], [300, 40, 20]
    q = torch.randn(48, 4, 32)
    cache = torch.randn(96, 2, 16, 64)
    k, v = cache.transpose(1, 2).split(32, -1)
    sinks = torch.randn(4)
    with set_current_vllm_config(VllmConfig()):
        layer = Attention(
            4, 32, 0.2, 2, sliding_window=25, logits_soft_cap=5.0, sinks=sinks.bfloat16()
        )
    layer.process_weights_after_loading(torch.float32)
    step: Metadata = builder(on_cpu=True, threshold=1).build(0, batch(queries, keys))
    out = torch.empty_like(q)
    named = torch.nn.Identity()
    named.layer_name = NAME
    assert layer.forward(named, q, q, q, cache, step, out) is out
    for i, (start, stop) in enumerate([(0, 1), (1, 41), (41, 48)]):
        wanted = blasst.attention(
            q[None, start:stop],
            *(t[i * 32 : i * 32 + 32].flatten(0, 1)[None, : keys[i]] for t in (k, v)),
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
