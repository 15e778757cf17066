"""What a pass of a calibrated model asks of the device: nothing that waits for it, or for the host.

On the CPU, where every read of a tensor is seen as it would be on a GPU.
"""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from blasst.hf import masks, packed
from blasst.versions import cache_name
from test_hf_settings import CONFIG
from tiny_models import VOCABULARY, make_model

pytestmark = pytest.mark.usefixtures("one_thread")

READS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero")


class NoReads(TorchDispatchMode):
    """An error for what would wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.name() not in READS, f"{func.name()} reads a tensor"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def model():
    return make_model("llama", sparse_attention_config=copy.deepcopy(CONFIG))


def tokens(batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def as_on_a_gpu(monkeypatch):
    """Lengths are not looked at for the sake of a warning."""
    monkeypatch.setattr("blasst.hf.forward._Lengths.known", lambda self: [])


@torch.no_grad()
def test_a_pass_without_padding_reads_no_tensor(model, monkeypatch):
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(packed, "find", lambda *_: None)  # looks at position_ids, once a pass
    ids = tokens(2, 200)
    cache = DynamicCache(config=model.config)
    for part in (ids[:, :198], ids[:, 198:199]):  # what a model needs once is made
        model(part, **{cache_name(type(model)): cache})
    with NoReads():
        model(ids[:, 199:], **{cache_name(type(model)): cache})


@torch.no_grad()
def test_a_captured_decode_reads_no_tensor_and_gives_the_same(model, monkeypatch):
    as_on_a_gpu(monkeypatch)
    ids = tokens(2, 201)
    padding = torch.ones(2, 300, dtype=torch.bool)
    padding[1, :30] = False

    def step(captured: bool) -> torch.Tensor:
        cache = {cache_name(type(model)): StaticCache(config=model.config, max_cache_len=300)}
        mask = padding[:, :300]
        model(ids[:, :200], attention_mask=mask[:, :200], **cache)
        position = torch.full((2, 1), 200)
        if not captured:
            return model(ids[:, 200:], position_ids=position, attention_mask=mask, **cache).logits
        with monkeypatch.context() as capturing, NoReads():
            capturing.setattr(masks, "is_deferred", lambda _: True)
            return model(ids[:, 200:], position_ids=position, attention_mask=mask, **cache).logits

    expected = step(captured=False)
    assert torch.equal(step(captured=True), expected)
