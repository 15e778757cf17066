"""Configurations travel between Model-Optimizer (nvidia-modelopt 0.47) and blasst, both ways."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from blasst.config import Law, Measured, SparseAttention, ThresholdTable, parse

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def modelopt() -> SimpleNamespace:
    import modelopt.torch.sparsity.attention_sparsity as sparse
    from modelopt.torch.sparsity.attention_sparsity.conversion import export_sparse_attention_config
    from modelopt.torch.sparsity.attention_sparsity.plugins import sparse_attn_config

    return SimpleNamespace(
        sparse=sparse,
        export=export_sparse_attention_config,
        load=sparse_attn_config.load_from_checkpoint_metadata,
    )


def test_blasst_reads_what_model_optimizer_writes(modelopt):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    model = modelopt.sparse.sparsify(
        LlamaForCausalLM(config), modelopt.sparse.config.SKIP_SOFTMAX_DEFAULT
    )
    laws = {"prefill": {"a": 7.93, "b": 8.61}, "decode": {"a": 0.12, "b": 9.85}}
    for module in model.modules():
        method = getattr(module, "_sparse_method_instance", None)
        if method is not None:
            method.calibration_params = laws
            method.target_sparse_ratio = {"prefill": 0.6, "decode": 0.4}
    written = json.loads(json.dumps(modelopt.export(model)))
    read = parse(written)
    assert read.targets == ("LlamaAttention",)
    assert read.laws == {phase: Law(**law) for phase, law in laws.items()}
    assert read.target_sparsity == {"prefill": 0.6, "decode": 0.4}
    assert read.producer[0] == "modelopt"
    assert read.to_dict() == written, "and writes it back as it was"


def test_model_optimizer_reads_what_blasst_writes(modelopt):
    other = ThresholdTable(
        "sink_first", "one_threshold", Law(9.0, 2.0, 1.5), (1024,), (0.5,), -torch.ones(1, 1, 1, 1)
    )
    policy = replace(other, order="reverse", below=(1024,), shorter=other)
    config = SparseAttention(
        targets=("LlamaAttention",),
        laws={"prefill": Law(7.5, 8.0), "decode": Law(0.5, 9.0)},
        target_sparsity={"prefill": 0.6, "decode": 0.4},
        ignore=("model.layers.1.self_attn",),
        measured={"prefill": Measured((64, 64), (policy,))},
    )
    entry = json.loads(json.dumps(config.to_dict()))
    loaded, preset = modelopt.load(SimpleNamespace(sparse_attention_config=entry))
    assert preset == "CHECKPOINT_CALIBRATED_SOFTMAX_SKIP"
    assert loaded["sparse_cfg"]["*model.layers.1.self_attn*"] == {"enable": False}
    rule = loaded["sparse_cfg"]["*attn*"]
    assert rule["target_sparse_ratio"] == {"prefill": 0.6, "decode": 0.4}
    assert rule["threshold_scale_factor"]["prefill"] == {"a": 7.5, "b": 8.0}
    assert rule["threshold_scale_factor"]["decode"] == {"a": 0.5, "b": 9.0}
