"""Policies: which tiles a model's attention may visit, under any test."""

import math

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

import blasst
from blasst import Bands, Threshold
from blasst.hf import key_ranges
from blasst.policies import from_dict, head_bands
from tiny_models import make_model

pytestmark = pytest.mark.usefixtures("one_thread")

BANDS = {"kind": "bands", "length": 300}


def tokens(batch=1, length=300):
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(3))


def plain_bands(module, query, key, value, attention_mask, scaling=None, **_):
    """Banded attention as one writes it down."""
    group, queries, keys = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    heads = query.shape[1]
    head = torch.stack([(distance >= 300 * h // heads) for h in range(heads)])
    beyond = torch.stack([(distance >= 300 * (h + 1) // heads) for h in range(heads)])
    visible = head & ~beyond
    scores = (query @ key.mT * scaling).masked_fill(~visible, -math.inf)
    some = visible.any(-1, keepdim=True)
    weights = torch.where(some, scores, 0.0).softmax(-1) * some
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register("plain_bands", plain_bands)
AttentionMaskInterface.register("plain_bands", key_ranges)


@pytest.mark.parametrize(("heads", "length"), [(1, 1), (4, 4), (9, 8192), (7, 100), (16, 1000)])
def test_bands_share_out_every_distance(heads, length):
    bands = head_bands(heads, length).tolist()
    assert [d for first, last in bands for d in range(first, last + 1)] == list(range(length))
    widths = [last - first + 1 for first, last in bands]
    assert max(widths) - min(widths) <= 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: head_bands(8, 7), "8 heads cannot have bands of 7 distances"),
        (lambda: Bands(0), "length of bands is 0; it must be a positive integer"),
        (lambda: Bands(2.5), "length of bands is 2.5; it must be a positive integer"),
        (lambda: from_dict({"kind": "band"}), "must be a mapping whose kind is one of bands"),
        (lambda: from_dict("bands"), "must be a mapping whose kind is one of bands"),
        (lambda: from_dict({"kind": "bands"}), "missing 1 required positional argument: 'length'"),
        (lambda: from_dict({**BANDS, "width": 3}), "unexpected keyword argument 'width'"),
    ],
)
def test_bad_bands(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


def logits_and_gradients(model, ids) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    out = model(ids, labels=ids)
    out.loss.backward()
    return out.logits.detach(), [p.grad.clone() for p in model.parameters()]


def test_a_model_from_a_configuration_trains_with_bands():
    model, plain = (make_model("llama", name, blasst_policy=BANDS) for name in ("blasst",) * 2)
    plain.set_attn_implementation("plain_bands")
    logits, gradients = logits_and_gradients(model, tokens(2))
    expected, expected_gradients = logits_and_gradients(plain, tokens(2))
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-3)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        assert (got - wanted).norm() <= 1e-4 * wanted.norm()
    dense = make_model("llama")(tokens(2)).logits
    assert not torch.allclose(logits, dense, atol=1e-2)


def test_bands_go_with_the_configuration(tmp_path):
    model = make_model("llama", blasst_policy=BANDS)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="blasst")
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_decode_sees_what_prefill_sees():
    model = make_model("llama", blasst_policy=BANDS)
    prompt = tokens(length=250)
    generated = model.generate(prompt, max_new_tokens=20, do_sample=False)
    again = model(generated).logits[0, 249:-1].argmax(-1)
    assert torch.equal(generated[0, 250:], again)


def test_set_policy_on_some_layers():
    model, by_config = make_model("llama"), make_model("llama", blasst_policy=BANDS)
    dense = model(tokens()).logits
    blasst.set_policy(model, Bands(300))
    assert torch.equal(model(tokens()).logits, by_config(tokens()).logits)
    blasst.set_policy(model, None, layers=[1])
    first_only = model(tokens()).logits
    assert not torch.equal(first_only, by_config(tokens()).logits)
    blasst.set_policy(model, None)
    assert torch.equal(model(tokens()).logits, dense)
    with pytest.raises(ValueError, match=r"no attention layer \[5\]"):
        blasst.set_policy(model, Bands(300), layers=[5])


def test_a_model_with_more_heads_than_distances():
    with pytest.raises(ValueError, match="4 heads cannot have bands of 3 distances"):
        blasst.set_policy(make_model("llama"), Bands(3))


def test_a_test_runs_under_a_policy():
    model = make_model("llama", blasst_policy=BANDS)
    with blasst.record() as dense:
        model(tokens())
    blasst.configure(model, prefill=Threshold(0.5))
    with blasst.record() as sparse:
        model(tokens())
    assert sparse.sparsity("prefill") > 0
    assert dense.tiles("prefill")[:, 0].equal(sparse.tiles("prefill")[:, 0])
    with blasst.record() as whole:
        make_model("llama")(tokens())
    assert dense.tiles("prefill")[:, 0].sum() < whole.tiles("prefill")[:, 0].sum()


def test_a_padded_request_has_the_bands_it_has_alone():
    model = make_model("llama", blasst_policy=BANDS)
    ids = tokens(2)
    mask = torch.ones_like(ids)
    mask[1, :60] = 0
    both = model(ids, attention_mask=mask).logits
    alone = model(ids[1:, 60:]).logits
    torch.testing.assert_close(both[1:, 60:], alone, atol=2e-3, rtol=1e-3)  # other positions


def test_bands_in_a_compiled_model():
    model = make_model("llama", blasst_policy=BANDS)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(tokens()).logits, model(tokens()).logits)


def test_more_keys_than_the_bands_have_distances():
    model = make_model("llama", blasst_policy=BANDS)
    with pytest.raises(ValueError, match="which is for at most 300 keys; a request has more"):
        model(tokens(length=301))
    # Padding does not count.
    mask = torch.ones(1, 310, dtype=torch.long)
    mask[:, :10] = 0
    model(tokens(length=310), attention_mask=mask)
