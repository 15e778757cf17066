"""Keys quantised once, and a cache of Transformers in 8 bits."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import blasst
from blasst import NotSupportedError, Threshold, attention, quantize_keys, rotate
from blasst.hf.eight_bit import EightBitLayer, Kinds, StaticEightBitLayer
from blasst.versions import cache_name
from test_attention import dense, distances, inputs
from tiny_models import VOCABULARY, make_model

pytestmark = pytest.mark.usefixtures("one_thread")
INT8, FP8 = torch.int8, torch.float8_e4m3fn


# The operator


@pytest.mark.parametrize("dim", [64, 80, 96])
def test_rotation_is_orthonormal_and_its_own_inverse(dim):
    x = torch.randn(3, 5, dim)
    norms = x.double().norm(dim=-1), rotate(x).double().norm(dim=-1)
    torch.testing.assert_close(*norms)
    torch.testing.assert_close(rotate(rotate(x)), x, atol=3e-6, rtol=0)
    size = dim & -dim
    first = torch.zeros(dim)
    first[0] = 1
    torch.testing.assert_close(rotate(first)[:size].abs(), torch.full((size,), size**-0.5))
    assert not rotate(first)[size:].any()


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_int8_scores_add_only_the_rounding_of_queries(dim):
    """To what the bytes of rotated keys cost, of which one channel was much larger than others."""
    q, k, v = inputs(queries=150, keys=400, dim=dim)
    k[..., 3] *= 60
    q[..., 3] /= 20
    exact = attention(q, k, v, causal=True)
    keys = quantize_keys(k)
    options = {"causal": True, "k_scale": keys.scale}
    of_keys, of_both = (
        attention(rotate(q), keys.k, v, **options, scores=scores) for scores in ("exact", "int8")
    )
    error = [((out - exact).norm() / exact.norm()).item() for out in (of_keys, of_both)]
    assert error[0] < error[1] < 1.45 * error[0]  # twice rounded, keys had 1.6 to 1.84


def test_int8_scores_do_not_turn_other_rotated_keys_back():
    q, k, v = inputs(queries=150, keys=400, dim=128)
    k[..., 3] *= 60
    q[..., 3] /= 20
    exact, plain, turned = (
        attention(q, k, v, causal=True, scores=scores)
        for q, k, scores in ((q, k, "exact"), (q, k, "int8"), (rotate(q), rotate(k), "int8"))
    )
    error = [((out - exact).norm() / exact.norm()).item() for out in (plain, turned)]
    assert error[1] < 1.5 * error[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_are_what_their_bytes_say(dtype):
    q, k, _ = inputs(queries=1, keys=300, dim=64, dtype=dtype)
    k = k + 5 * torch.randn(64, generator=torch.Generator().manual_seed(1)).to(dtype)
    keys = quantize_keys(k)
    assert (keys.k.dtype, keys.scale.shape, keys.mean.shape) == (INT8, (2, 2), (2, 2, 64))
    mean = k.double().mean(1)
    torch.testing.assert_close(keys.mean.double(), mean, atol=1e-6, rtol=1e-6)
    units = (
        rotate(k.double().float() - keys.mean[:, None]).double()
        / keys.scale.double()[:, None, :, None]
    )
    assert (units - keys.k).abs().max() < 0.501
    assert (keys.k.int().abs().amax((1, 3)) == 127).all()
    # Products with rotated queries are the keys' own, but for the mean and half a unit an element.
    exact = torch.einsum("bhd,bkhd->bhk", q[:, 0, ::2].double(), k.double() - mean[:, None])
    got = torch.einsum("bhd,bkhd->bhk", rotate(q)[:, 0, ::2].double(), keys.k.double())
    error = (got * keys.scale[..., None] - exact).norm() / exact.norm()
    assert error < 0.02


def test_attention_over_them_is_attention_over_the_numbers_that_they_stand_for():
    q, k, v = inputs(queries=150, keys=400, dim=64)
    keys = quantize_keys(k)
    numbers = keys.k.double() * keys.scale.double()[:, None, :, None]
    options = {"causal": True, "k_scale": keys.scale}
    out = attention(rotate(q), keys.k, v, **options)
    visible = distances(150, 400) >= 0
    torch.testing.assert_close(
        out.double(), dense(rotate(q), numbers, v, visible), atol=2e-5, rtol=1e-5
    )
    exact = attention(q, k, v, causal=True)
    error = (out - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.05
    sparse = attention(rotate(q), keys.k, v, **options, threshold=0.3, return_stats=True)
    plain = attention(q, k, v, causal=True, threshold=0.3, return_stats=True)
    assert sparse.stats.sparsity == pytest.approx(plain.stats.sparsity, abs=0.01)


def test_chunks_join_the_keys_before_them():
    _, k, _ = inputs(queries=1, keys=200, dim=64)
    whole = quantize_keys(k)
    parts = [quantize_keys(part, mean=whole.mean, scale=whole.scale) for part in k.split(70, 1)]
    assert torch.equal(torch.cat([part.k for part in parts], 1), whole.k)
    beyond = quantize_keys(10 * k, mean=0 * whole.mean, scale=whole.scale)
    assert beyond.k.int().abs().max() == 127
    nothing = quantize_keys(torch.zeros(1, 3, 1, 16))
    assert not nothing.k.any() and nothing.scale.item() == 1


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"k": torch.zeros(1, 2, 3)}, r"k is \[1, 2, 3\]; it must be \[batch"),
        ({"k": torch.zeros(1, 2, 1, 16, dtype=INT8)}, "k is torch.int8; it must be of a floating"),
        ({"k": None}, "k is a NoneType"),
        ({"mean": torch.zeros(16)}, r"mean is \[16\]; for this k it must be \[1, 1, 16\]"),
        ({"scale": torch.ones(2, 1)}, r"scale is \[2, 1\]; for this k it must be \[1, 1\]"),
        ({"scale": torch.zeros(1, 1)}, r"scale\[0, 0\] is 0.0; it must be positive and finite"),
        ({"scale": -torch.ones(1, 1)}, r"scale\[0, 0\] is -1.0; it must be positive and finite"),
        ({"scale": torch.full((1, 1), math.nan)}, r"scale\[0, 0\] is nan; it must be positive"),
        ({"mean": torch.full((1, 1, 16), math.inf)}, r"mean\[0, 0, 0\] is inf; it must be finite"),
        ({"k": torch.full((1, 2, 1, 16), math.nan)}, r"k\[0, 0, 0, 0\] is nan; it must be finite"),
    ],
)
def test_bad_arguments_of_quantize_keys(change, error):
    with pytest.raises((TypeError, ValueError), match=error):
        quantize_keys(**{"k": torch.zeros(1, 2, 1, 16), **change})


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (torch.zeros(3, 16, dtype=torch.int32), "x is torch.int32; it must be of a floating-point"),
        (torch.zeros(3, 0), r"x is \[3, 0\]; its last dimension"),
        (torch.tensor(1.0), r"x is \[\]; its last dimension"),
        (1.0, "x is a float"),
    ],
)
def test_bad_arguments_of_rotate(x, error):
    with pytest.raises((TypeError, ValueError), match=error):
        rotate(x)


# A layer of the cache


def states(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    common = 4 * torch.randn(1, 2, 1, 16, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, 2, tokens, 16, generator=generator)
    return [(keys + common).to(dtype), values.to(dtype)]


def numbers(t: Tensor, layer: EightBitLayer | StaticEightBitLayer, which: int) -> Tensor:
    """Float64 states that attention would see, before they were rotated."""
    if t.dtype not in (INT8, FP8):
        return t.double()
    number = t.double() * t.blasst_scale.double()[..., None, None]
    if t.blasst_rotated:
        number = rotate(number.float()).double()
    mean = layer._stores[which].mean
    return number if mean is None else number + mean


def make_layer(static: bool, kept: Kinds) -> EightBitLayer | StaticEightBitLayer:
    return StaticEightBitLayer(kept, 400) if static else EightBitLayer(kept)


KEPT = [Kinds(INT8, INT8, True), Kinds(INT8, None, False), Kinds(FP8, FP8, False)]


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("kept", KEPT, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_holds_what_it_was_given(static, kept, dtype):
    layer = make_layer(static, kept)
    chunks = [states(n, seed, dtype) for seed, n in enumerate((130, 1, 64, 1, 1, 150))]
    chunks[2][0] *= 3  # beyond the range of the first: the unit grows
    first = layer.update(*chunks[0])
    assert first[0] is chunks[0][0] and first[1] is chunks[0][1]
    for end in range(2, len(chunks) + 1):
        given = layer.update(*chunks[end - 1])
        for which, t in enumerate(given):
            whole = torch.cat([chunk[which] for chunk in chunks[:end]], 2).double()
            got = numbers(t, layer, which)[:, :, : whole.shape[2]]
            kind = kept[which]
            if kind is None:
                assert torch.equal(got, whole)
                continue
            unit = t.blasst_scale.amax().item()
            # Rounded once more where the unit grew; fp8 to a 16th of its own size.
            most = 1.02 * unit * 4 if kind == INT8 else whole.abs().max() / 16 * 1.02
            assert (got - whole).abs().max() < most
    assert int(layer.get_seq_length()) == 347


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_layer_is_reset_and_its_requests_change_places(static):
    layer = make_layer(static, KEPT[0])
    for turn in range(2):
        keys, values = states(100, turn)
        keys[1] *= 5
        layer.update(keys, values)
        layer.reorder_cache(torch.tensor([1, 1]))
        new = [t[:1].repeat(2, 1, 1, 1) for t in states(1, 9)]
        given = numbers(layer.update(*new)[0], layer, 0)
        assert (given[0, :, :100] - keys[1]).abs().max() < 0.5
        assert torch.equal(given[0, :, :100], given[1, :, :100])
        layer.reset()
        assert int(layer.get_seq_length()) == 0


def test_a_growing_layer_is_cut_and_repeated():
    layer = EightBitLayer(KEPT[0])
    keys, values = states(100)
    layer.update(keys, values)
    layer.crop(-40)
    assert layer.get_seq_length() == 60
    layer.batch_repeat_interleave(2)
    given = numbers(layer.update(*(t.repeat(2, 1, 1, 1) for t in states(5, 1)))[0], layer, 0)
    assert given.shape == (4, 2, 65, 16)
    assert (given[:, :, :60] - keys[:, :, :60].repeat_interleave(2, 0)).abs().max() < 0.2
    layer.batch_select_indices(torch.tensor([3]))
    given = numbers(layer.update(*(t[:1] for t in states(5, 2)))[0], layer, 0)
    assert (given[0, :, :60] - keys[1, :, :60]).abs().max() < 0.2


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("which", [0, 1], ids=["keys", "values"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_what_8_bits_cannot_say_is_an_error_and_changes_nothing(static, which, tokens):
    layer = make_layer(static, KEPT[0])
    layer.update(*states(1030 if not static else 300))
    new = [3 * t for t in states(tokens, 1)]  # beyond the range of the first
    before = [layer.keys.clone(), layer.values.clone()]
    broken = [t.clone() for t in new]
    broken[which][1, 0, 0, 3] = math.nan
    name = ("keys", "values")[which]
    with pytest.raises(ValueError, match=rf"{name}\[1, 0, 0, 3\] is nan; it must be finite"):
        layer.update(*broken)
    assert torch.equal(layer.keys, before[0]) and torch.equal(layer.values, before[1])
    layer.update(*new)


# Models

CACHES = [
    {},
    {"values": None},
    {"keys": "fp8", "values": "fp8"},
    {"max_cache_len": 300},
    {"max_cache_len": 300, "keys": "fp8", "values": "fp8"},
]


def prompts(*lengths: int) -> tuple[Tensor, Tensor]:
    """Token ids, padded on the left, and the attention mask."""
    shape = len(lengths), max(lengths)
    ids = torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return ids * mask, mask.long()


@torch.inference_mode()
def logits(model, ids: Tensor, cache, chunk: int) -> Tensor:
    """Of all positions: a chunk, another chunk, then token by token."""
    name = cache_name(type(model))
    cuts = [0, chunk, 2 * chunk, *range(2 * chunk + 1, ids.shape[1] + 1)]
    parts = [model(ids[:, begin:end], **{name: cache}).logits for begin, end in pairwise(cuts)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("options", CACHES, ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_sliding_and_global"])
def test_logits_move_by_the_rounding(name, options):
    model = make_model(name, initializer_range=0.05)
    blasst.configure(model, prefill=Threshold(0.0), decode=Threshold(0.0))
    ids, _ = prompts(150, 150)
    exact = logits(model, ids, DynamicCache(config=model.config), 60)
    got = logits(model, ids, blasst.eight_bit_cache(model, **options), 60)
    assert torch.equal(got[:, :60], exact[:, :60])  # the first pass attends to what it is given
    error = (got[:, 60:] - exact[:, 60:]).norm() / exact[:, 60:].norm()
    assert 1e-5 < error < (0.03 if options.get("keys") == "fp8" else 0.02)


@pytest.mark.parametrize("options", CACHES, ids=str)
def test_chunks_with_scores_in_int8(options):
    model = make_model("llama", initializer_range=0.05)
    ids, _ = prompts(150, 150)
    blasst.configure(model, prefill=Threshold(0.0), decode=Threshold(0.0))
    exact = logits(model, ids, DynamicCache(config=model.config), 60)
    blasst.configure(model, prefill=Threshold(0.0, scores="int8"), decode=Threshold(0.0))
    got = logits(model, ids, blasst.eight_bit_cache(model, **options), 60)
    error = (got - exact).norm() / exact.norm()
    assert 1e-5 < error < 0.03


@pytest.mark.parametrize("options", CACHES, ids=str)
def test_generates(options):
    model = make_model("llama", initializer_range=0.15)
    blasst.configure(model, prefill=Threshold(0.0), decode=Threshold(0.0))
    ids, mask = prompts(150, 90)
    asked = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    name = cache_name(type(model))
    got = model.generate(ids, **asked, **{name: blasst.eight_bit_cache(model, **options)})
    assert len(got[:, 150:].unique()) > 3, "a model that repeats itself shows nothing"
    with torch.inference_mode():  # each token is about as good as the best of exact attention
        exact = model(got, attention_mask=torch.cat([mask, torch.ones(2, 12).long()], 1)).logits
    chosen = exact[:, 149:-1].gather(-1, got[:, 150:, None])[..., 0]
    assert (exact[:, 149:-1].amax(-1) - chosen).max() < 0.15 * exact.std()
    blasst.configure(model, decode=Threshold(0.9))
    with blasst.record() as record:
        model.generate(ids, **asked, **{name: blasst.eight_bit_cache(model, **options)})
    assert record.sparsity("decode") > 0.02


def test_generates_with_beams():
    model = make_model("llama")
    ids, mask = prompts(150, 90)
    asked = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    name = cache_name(type(model))
    got = model.generate(ids, **asked, **{name: blasst.eight_bit_cache(model)})
    assert got.shape == (2, 158)


@pytest.mark.parametrize("keys", ["int8", "fp8"])
def test_decode_with_a_static_cache_compiles(keys):
    model = make_model("llama", initializer_range=0.05)
    blasst.configure(model, prefill=Threshold(0.1), decode=Threshold(0.1))
    ids, _ = prompts(80)
    name = cache_name(type(model))
    kinds = {"keys": keys, "values": keys, "max_cache_len": 128}
    compiled = torch.compile(model.forward, fullgraph=True)
    with torch.inference_mode():
        parts = []
        for forward in (model.forward, compiled):
            cache = blasst.eight_bit_cache(model, **kinds)
            model(ids[:, :70], **{name: cache})
            steps = [forward(ids[:, i : i + 1], **{name: cache}).logits for i in range(70, 80)]
            parts.append(torch.cat(steps, 1))
    torch.testing.assert_close(*parts, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gemma2_softcap", "gpt_oss_sinks"])
def test_level_of_scores_needs_keys_that_are_not_centred(name):
    model = make_model(name)
    blasst.configure(model, prefill=Threshold(0.0), decode=Threshold(0.0))
    ids, _ = prompts(150)
    with pytest.raises(NotSupportedError, match=r"needs blasst.eight_bit_cache\(model, center=Fa"):
        logits(model, ids, blasst.eight_bit_cache(model), 60)
    exact = logits(model, ids, DynamicCache(config=model.config), 60)
    got = logits(model, ids, blasst.eight_bit_cache(model, center=False), 60)
    assert (got - exact).norm() / exact.norm() < 0.05


def test_absolute_thresholds_need_keys_that_are_not_centred():
    model = make_model("llama")
    blasst.configure(model, prefill=Threshold(0.0), decode=Threshold(absolute_threshold=-math.inf))
    ids, _ = prompts(130)
    with pytest.raises(NotSupportedError, match="an absolute threshold needs"):
        logits(model, ids, blasst.eight_bit_cache(model), 60)
    logits(model, ids, blasst.eight_bit_cache(model, center=False), 60)


def test_refusals():
    model = make_model("llama")
    for change, error in (
        ({"keys": "int4"}, "keys is 'int4'; it must be one of 'int8', 'fp8'"),
        ({"keys": None}, "keys is None"),
        ({"values": "bf16"}, "values is 'bf16'; it must be one of 'int8', 'fp8', None"),
        ({"max_cache_len": 0}, "max_cache_len is 0"),
    ):
        with pytest.raises(ValueError, match=error):
            blasst.eight_bit_cache(model, **change)
    with pytest.raises(TypeError, match="max_cache_len is '100'"):
        blasst.eight_bit_cache(model, max_cache_len="100")
    with pytest.raises(TypeError, match="model is str"):
        blasst.eight_bit_cache("llama")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="the model's attn_implementation is 'sdpa'; load it with"):
        blasst.eight_bit_cache(model)
    model.set_attn_implementation("blasst")
    with pytest.raises(NotSupportedError, match="MistralForCausalLM has no layer that caches"):
        blasst.eight_bit_cache(make_model("mistral_sliding"))
    key = torch.zeros(1, 2, 5, 16, dtype=INT8)
    layer = model.model.layers[0].self_attn
    with pytest.raises(NotSupportedError, match=r"without scales; .*blasst.eight_bit_cache"):
        blasst.hf.attention_forward(layer, torch.zeros(1, 4, 1, 16), key, key, None)


def test_an_operator_call_over_pages_of_quantised_keys():
    q, k, v = inputs(queries=2, keys=128, dim=64)
    keys = quantize_keys(k)
    options = {"phase": "decode", "causal": True, "threshold": 0.1, "k_scale": keys.scale}
    whole = attention(rotate(q), keys.k, v, **options)
    pages = [t.unflatten(1, (8, 16)).flatten(0, 1) for t in (keys.k, v)]
    table, lengths = torch.arange(16).reshape(2, 8), torch.tensor([128, 128])
    paged = attention(rotate(q), *pages, page_table=table, lengths=lengths, **options)
    assert torch.equal(paged, whole)
