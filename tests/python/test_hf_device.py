"""What a pass of a calibrated model asks of the device: nothing that waits for it, or for the host.

On the CPU, where every read of a tensor is seen as it would be on a GPU.
"""

import copy
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

import blasst
from blasst.hf import forward, masks, packed
from blasst.hf.layers import attention_modules
from blasst.ops.library import tile_of
from blasst.policies import Bands
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
    """Tensors are taken for those of a device that must be waited for."""
    for module in (masks, forward):
        monkeypatch.setattr(module, "is_at_hand", lambda _: False)


def without_reads_in_layers(model):
    """The attention layers may read no tensor; what comes before them may."""
    for module in attention_modules(model):
        reads = NoReads()
        module.register_forward_pre_hook(lambda *_, reads=reads: reads.__enter__() and None)
        module.register_forward_hook(
            lambda *_, reads=reads: reads.__exit__(None, None, None), always_call=True
        )


@torch.no_grad()
def test_a_pass_without_padding_reads_no_tensor(model, monkeypatch):
    as_on_a_gpu(monkeypatch)
    ids = tokens(2, 200)
    cache = DynamicCache(config=model.config)
    for part in (ids[:, :198], ids[:, 198:199]):  # what a model needs once is made
        model(part, **{cache_name(type(model)): cache})
    with NoReads():
        model(ids[:, 199:], **{cache_name(type(model)): cache})


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
@torch.no_grad()
def test_no_layer_of_a_decode_step_reads_a_tensor(model, monkeypatch, cache_class, padded):
    as_on_a_gpu(monkeypatch)
    blasst.set_policy(model, Bands(512))
    ids = tokens(2, 200)
    padding = torch.ones(2, 200, dtype=torch.bool)
    padding[1, :30] = not padded
    room = {"max_cache_len": 600} if cache_class is StaticCache else {}
    cache = {cache_name(type(model)): cache_class(config=model.config, **room)}
    for begin, end in ((0, 198), (198, 199)):  # what a model needs once is made
        model(ids[:, begin:end], attention_mask=padding[:, :end], **cache)
    without_reads_in_layers(model)
    position = torch.full((2, 1), 199)
    got = model(ids[:, 199:], position_ids=position, attention_mask=padding, **cache).logits
    assert not got.isnan().any()


@torch.no_grad()
def test_a_decode_step_that_goes_on_behind_other_sequences_is_found_on_the_device(
    model, monkeypatch
):
    as_on_a_gpu(monkeypatch)
    ids = tokens(1, 31)
    cache = {cache_name(type(model)): DynamicCache(config=model.config)}
    model(ids[:, :30], position_ids=torch.arange(15).repeat(2)[None], **cache)
    with pytest.raises(RuntimeError, match="a sequence starts behind other tokens in the cache"):
        model(ids[:, 30:], position_ids=torch.tensor([[15]]), **cache)


@pytest.mark.parametrize(
    "message",
    [masks._HOLES, masks._BIAS, masks.PACKED_COMPILED, packed.BEHIND_OTHERS, "ä" * 300, "x" * 255],
)
def test_messages_are_cut_to_what_a_check_on_a_gpu_takes(message, monkeypatch):
    given = []
    monkeypatch.setattr(torch, "_assert_async", lambda _, message: given.append(message))
    monkeypatch.setattr(masks, "is_deferred", lambda _: True)
    masks.require(torch.tensor(False), message)
    [said] = given
    assert len(said.encode()) < 255
    assert said == message or message.startswith(said.removesuffix("..."))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=re.escape(message)):
        masks.require(torch.tensor(False), message)


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


def test_autocast_decides_whose_tiles_a_call_has():
    """A GPU has no tiles of float32, in which a layer's rotated queries are under autocast."""
    gpu, sizes = torch.device("cuda"), (torch.float32, 64)
    with pytest.raises(blasst.NotSupportedError, match="q is float32"):
        tile_of("prefill", gpu, *sizes)
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        assert tile_of("prefill", gpu, *sizes) == tile_of("prefill", gpu, torch.bfloat16, 64)
    finally:
        torch.set_autocast_enabled("cuda", before)
