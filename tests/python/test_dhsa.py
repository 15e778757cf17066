"""Chunks and the choice among them, against a direct float64 implementation, one by one."""

import math

import pytest
import torch

import blasst
from blasst import Dhsa, attention
from blasst.methods.dhsa import Chunks, Predictor
from blasst.ops.library import call as operator
from blasst.policies import Call, from_dict
from tiny_models import make_model

pytestmark = pytest.mark.usefixtures("one_thread")

TILE = 64
WINDOW, FEATURES, HIDDEN = 4, 32, 64


def inputs(keys=1000, queries=None, heads=4, kv_heads=2, dim=40, dtype=torch.float32):
    """Keys that come in stretches of a common direction, each of its own length."""
    generator = torch.Generator().manual_seed(keys + heads)
    stretch = torch.randint(0, 40, (keys,), generator=generator).sort().values
    direction = torch.randn(40, kv_heads, dim, generator=generator)
    k = direction[stretch] + 0.4 * torch.randn(keys, kv_heads, dim, generator=generator)
    q = torch.randn(queries or keys, heads, dim, generator=generator)
    return q.to(dtype), k.to(dtype)


def predictor(inputs=80):
    generator = torch.Generator().manual_seed(9)
    parts = (inputs * FEATURES, WINDOW, WINDOW, (4 * FEATURES + 1) * HIDDEN, HIDDEN, HIDDEN, 1)
    weights = [torch.randn(n, generator=generator) / n**0.25 for n in parts]
    return Predictor(torch.cat(weights), (inputs, WINDOW, FEATURES, HIDDEN))


RULES = {
    "fixed": {"chunker": "fixed", "least": 1, "most": 50, "threshold": 0.0},
    "shift": {"chunker": "shift", "least": 3, "most": 70, "threshold": 0.55},
    "trained": {"chunker": "trained", "least": 5, "most": 64, "threshold": 0.3},
}


def cut(k, rule, trained=None):
    chunks = Chunks(*k.shape[1:])
    chunks.extend(k, rule, trained)
    return chunks


def plain_scores(k, rule, trained):
    """float64, NaN where there is none."""
    scores = torch.full((len(k),), math.nan, dtype=torch.float64)
    k = k.double()
    if rule["chunker"] == "shift":
        scores[1:] = torch.cosine_similarity(k[:-1], k[1:], dim=-1).mean(-1)
    if rule["chunker"] == "trained":
        sizes = (k[0].numel() * FEATURES, WINDOW, WINDOW, (4 * FEATURES + 1) * HIDDEN, HIDDEN)
        parts = trained.weights.double().split((*sizes, HIDDEN, 1))
        y = k.flatten(1) @ parts[0].reshape(-1, FEATURES)
        for t in range(WINDOW, len(k) - WINDOW + 1):
            left, right = parts[1] @ y[t - WINDOW : t], parts[2] @ y[t : t + WINDOW]
            cosine = torch.cosine_similarity(left, right, dim=0)
            x = torch.cat([left, right, left - right, left * right, cosine[None]])
            hidden = (x @ parts[3].reshape(-1, HIDDEN) + parts[4]).relu()
            scores[t] = hidden @ parts[5] + parts[6][0]
    return scores


def plain_starts(scores, rule):
    last = len(scores) - (WINDOW - 1 if rule["chunker"] == "trained" else 0)
    starts = [0]
    for t in range(1, last):
        score = scores[t].item()
        wanted = score < rule["threshold"] if rule["chunker"] == "shift" else (
            score > rule["threshold"])  # fmt: skip
        length = t - starts[-1]
        if (wanted and length >= rule["least"]) or length >= rule["most"]:
            starts.append(t)
    return starts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunker", RULES)
def test_every_boundary_is_that_of_a_direct_implementation(chunker, dtype):
    _, k = inputs(dtype=dtype)
    rule, trained = RULES[chunker], predictor() if chunker == "trained" else None
    wanted = plain_scores(k, rule, trained)
    if chunker != "fixed":
        shape = list(trained.shape) if trained else []
        weights = trained.weights if trained else None
        scores = torch.ops.blasst.chunks_scores(k, chunker, weights, shape)
        torch.testing.assert_close(scores.double(), wanted, atol=1e-4, rtol=1e-4, equal_nan=True)
        assert (wanted - rule["threshold"]).abs().nan_to_num(1).min() > 1e-6, "too close to tell"
    chunks = cut(k, rule, trained)
    starts, sums = chunks.starts, chunks.sums
    assert starts.tolist() == plain_starts(wanted, rule)
    lengths = torch.diff(torch.cat([starts.long(), torch.tensor([1000])]))
    assert 5 < len(starts) < 300
    assert chunker == "fixed" or len(set(lengths.tolist())) > 5
    for start, length, total in zip(starts.tolist(), lengths.tolist(), sums, strict=True):
        exact = k[start : start + length].double().sum(0)
        torch.testing.assert_close(total.double(), exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunker", RULES)
def test_keys_that_come_one_by_one_are_cut_as_if_at_once(chunker):
    _, k = inputs(keys=400)
    rule, trained = RULES[chunker], predictor() if chunker == "trained" else None
    chunks = cut(k[:3], rule, trained)
    for step in [1] * 30 + [17, 64, 1, 1, 150] + [1] * 134:
        chunks.extend(k[: chunks.keys + step], rule, trained)
    assert chunks.keys == 400
    whole = cut(k, rule, trained)
    assert torch.equal(chunks.starts, whole.starts)
    assert torch.equal(chunks.sums, whole.sums)


def test_keys_may_come_in_any_gradient_mode_and_others_start_anew():
    _, k = inputs(keys=400)
    chunks = Chunks(*k.shape[1:])
    for keys, mode in ((200, torch.inference_mode), (300, torch.no_grad), (400, torch.enable_grad)):
        with mode():
            chunks.extend(k[:keys], RULES["shift"])
    assert torch.equal(chunks.sums, cut(k, RULES["shift"]).sums)
    other = torch.cat([k[:399] + 1, k[:1]])
    chunks.extend(other, RULES["shift"])
    assert torch.equal(chunks.starts, cut(other, RULES["shift"]).starts)
    assert torch.equal(chunks.sums, cut(other, RULES["shift"]).sums)


def plain_choice(q, k, starts, decode, budget):
    """[heads, query tiles, key tiles]; decode [kv_heads, 1, key tiles]. By the definition."""
    keys, kv_heads = k.shape[:2]
    heads, rows = q.shape[1], len(q)
    group = heads // kv_heads
    ends = [*starts[1:], keys]
    representations = torch.stack(
        [k[a:b].double().sum(0) / math.sqrt(b - a) for a, b in zip(starts, ends, strict=True)]
    )
    tile_rows = rows if decode else TILE
    result = []
    for head in range(kv_heads if decode else heads):
        for first in range(0, rows, tile_rows):
            end = min(rows, first + tile_rows)
            position = keys - rows + end - 1
            share = isinstance(budget, float)
            room = -(-(math.ceil(budget * (position + 1)) if share else budget) // TILE)
            own = range((keys - rows + first) // TILE, position // TILE + 1)
            chosen = {0, *own}
            local = max(i for i, start in enumerate(starts) if start <= position)
            of_kv_head = representations[:local, head if decode else head // group]
            if decode:
                each = q[:, head * group : (head + 1) * group].double() @ of_kv_head.T
                scores = each.amax((0, 1))
            else:
                tile = q[first:end, head].double().sum(0) / math.sqrt(end - first)
                scores = of_kv_head @ tile
            order = scores.argsort(descending=True, stable=True).tolist()
            gaps = -torch.diff(scores.sort(descending=True).values)
            assert len(gaps) == 0 or gaps.min() > 1e-7, "too close to tell"
            for chunk in [local, *order]:
                new = set(range(starts[chunk] // TILE, min(own[-1], (ends[chunk] - 1) // TILE) + 1))
                if len(chosen | new) <= room:
                    chosen |= new
            result.append([tile in chosen for tile in range(-(-keys // TILE))])
    return torch.tensor(result).unflatten(0, (kv_heads if decode else heads, -1))


@pytest.mark.parametrize("budget", [0.25, 0.6, 1.0, 200, 1000])
@pytest.mark.parametrize(("queries", "decode"), [(1000, False), (300, False), (1, True), (3, True)])
def test_every_choice_is_that_of_a_direct_implementation(queries, decode, budget):
    q, k = inputs(queries=queries)
    chunks = cut(k, RULES["shift"])
    share = isinstance(budget, float)
    got = torch.ops.blasst.chunks_select(
        q,
        chunks.starts,
        chunks.sums,
        1000,
        decode,
        0 if share else budget,
        budget if share else 0.0,
    )
    assert torch.equal(got.bool(), plain_choice(q, k, chunks.starts.tolist(), decode, budget))
    if budget in (1.0, 1000):
        position = torch.arange(1000 - queries, 1000)[:: queries if decode else TILE]
        last = (position + (queries if decode else TILE) - 1).clamp(max=999) // TILE
        assert (got.sum(-1) >= last + 1).all()


def test_attention_reads_the_chosen_tiles_and_nothing_else():
    q, k = inputs()
    policy = Dhsa(budget=0.25, **RULES["shift"])
    for queries, phase in ((1000, "prefill"), (1, "decode")):
        query = q[None, -queries:]
        blocks = policy.visit(Call(0, phase, query, k[None], None)).blocks
        v = torch.randn(k.shape, generator=torch.Generator().manual_seed(1))
        got = attention(query, k[None], v[None], causal=True, blocks=blocks, phase=phase)
        seen = blocks.bool().repeat_interleave(1 if phase == "prefill" else 2, 0)
        seen = seen.repeat_interleave(TILE, 2)[..., :1000]
        unread = ~seen.any(1).view(2, -1, 1000).any(1).T  # [keys, kv_heads]: by nobody
        assert phase == "prefill" or unread.any()
        k_lost, v_lost = (t.masked_fill(unread[..., None], math.nan) for t in (k, v))
        options = {"causal": True, "blocks": blocks, "phase": phase}
        again = attention(query, k_lost[None], v_lost[None], **options)
        assert torch.equal(got, again)
        rows = seen if phase == "decode" else seen.repeat_interleave(TILE, 1)[:, :1000]
        visible = rows & torch.ones(queries, 1000, dtype=torch.bool).tril(1000 - queries)
        heads_k, heads_v = (t.double().transpose(0, 1).repeat_interleave(2, 0) for t in (k, v))
        scores = query[0].double().transpose(0, 1) @ heads_k.mT / math.sqrt(40)
        out = scores.masked_fill(~visible, -math.inf).softmax(-1) @ heads_v
        torch.testing.assert_close(got[0].double(), out.transpose(0, 1), atol=1e-5, rtol=1e-4)


def tokens(batch=1, length=300):
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(3))


def test_a_whole_budget_is_dense():
    model = make_model("llama")
    dense = model(tokens()).logits
    blasst.set_policy(model, Dhsa(budget=1.0))
    assert torch.equal(model(tokens()).logits, dense)
    blasst.set_policy(model, Dhsa(budget=10_000))
    assert torch.equal(model(tokens()).logits, dense)
    generated = model.generate(tokens(), max_new_tokens=4, do_sample=False)
    blasst.set_policy(model, None)
    expected = model.generate(tokens(), max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, expected)


def test_a_model_reads_within_its_budget_in_prefill_and_decode():
    model = make_model("llama", blasst_policy={"kind": "dhsa", "budget": 192, "most": 32})
    with blasst.record() as sparse:
        model.generate(tokens(length=600), max_new_tokens=8, do_sample=False)
    high = blasst.Threshold(absolute_threshold=100.0)  # of each visit the first tiles are left
    blasst.configure(model, prefill=high, decode=high)
    with blasst.record() as both:
        model.generate(tokens(length=600), max_new_tokens=8, do_sample=False)
    prefill = sum(min(tile + 1, 3) for tile in range(10))
    assert sparse.tiles("prefill")[:, 0].unique().tolist() == [prefill]
    assert sparse.tiles("decode")[:, 0].unique().tolist() == [7 * 3]
    assert both.tiles("prefill")[:, 0].unique().tolist() == [prefill]
    assert both.sparsity("prefill") > 0
    assert both.sparsity("decode") > 0


@pytest.mark.parametrize("batch", [1, 2])
def test_decode_goes_on_from_the_chunks_of_prefill(batch):
    ids = tokens(batch, 260)
    for cache in ("dynamic", "static"):
        policy, fresh = (Dhsa(budget=128, chunker="shift", threshold=0.3) for _ in range(2))
        model = make_model("llama")
        blasst.set_policy(model, policy)
        generated = model.generate(
            ids, max_new_tokens=12, do_sample=False, cache_implementation=cache
        )
        states = dict(policy._states)
        assert states[0, batch - 1].keys == 271
        # Another request of the same length does not inherit them.
        other = (ids + 1) % 90 + 2
        blasst.set_policy(model, policy)
        model.generate(other, max_new_tokens=12, do_sample=False)
        blasst.set_policy(model, fresh)
        model(generated[:, :-1])
        for request in range(batch):
            went_on, at_once = (of[0, request] for of in (states, fresh._states))
            assert torch.equal(went_on.starts, at_once.starts)
            torch.testing.assert_close(went_on.sums, at_once.sums)


BAD = [
    (lambda: Dhsa(0), "budget is 0; it must be a whole number of keys from 1 on"),
    (lambda: Dhsa(0.0), "budget is 0.0"),
    (lambda: Dhsa(1.5), "budget is 1.5"),
    (lambda: Dhsa(True), "budget is True"),
    (lambda: Dhsa("a"), "budget is 'a'"),
    (lambda: Dhsa(0.5, chunker="word"), "chunker is 'word'; it must be one of"),
    (lambda: Dhsa(0.5, least=9, most=8), "chunks have 9 to 8 keys"),
    (lambda: Dhsa(0.5, threshold=math.nan), "threshold is nan"),
    (lambda: Dhsa(0.5, chunker="trained"), "'trained' needs a file of predictors"),
    (lambda: Dhsa(0.5, predictors="a"), "the others take none"),
    (lambda: from_dict({"kind": "dhsa"}), "missing 1 required positional argument: 'budget'"),
    (lambda: choose(budget=(1001, 0.0)), "budget of keys is 1001; it must be 1 to 1000"),
    (lambda: choose(budget=(0, 0.0)), "the budget is a share of 0; it must be above 0"),
    (lambda: choose(budget=(100, 0.5)), "the budget is 100 keys and a share of 0.5; one of them"),
    (lambda: choose(budget=(100, math.nan)), "100 keys and a share of nan; one of them must be 0"),
    (lambda: choose(starts=[0, 500, 400]), "chunk 2 begins at 400; chunks must cover the sequen"),
    (lambda: choose(starts=[5, 500, 700]), "chunk 0 begins at 5; chunks must cover the sequence"),
    (lambda: choose(starts=[0, 500, 1000]), "the last chunk begins at 1000, but there are 1000"),
    (lambda: choose(starts=[0, 500]), "sums is [3, 2, 40]; it must be [chunks, kv_heads, head"),
    (
        lambda: cut(inputs()[1], RULES["trained"], predictor(inputs=128)),
        "the boundary predictor is for keys of 128 elements; these have 2 KV heads of 40, 80",
    ),
    (lambda: choose(starts=[[0, 500, 700]]), "starts is [1, 3]; it must be [chunks]"),
    (lambda: cut(inputs()[1], RULES["trained"]), "predictor goes with the chunker 'trained'"),
]


def choose(starts=(0, 500, 700), budget=(0, 0.5)):
    q, _ = inputs(queries=10)
    starts = torch.tensor(starts, dtype=torch.int32)
    return select(q, starts, torch.zeros(3, 2, 40), budget)


def select(query, starts, sums, budget=(0, 0.5)):
    keys, share = budget
    return operator(
        "chunks_select",
        **{"query": query, "starts": starts, "sums": sums, "keys": 1000, "decode": False},
        **{"budget_keys": keys, "budget_share": share},
    )


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


def test_the_chunks_of_another_type_or_device_are_refused():
    q, _ = inputs(queries=10)
    good = {"starts": torch.tensor([0, 500, 700], dtype=torch.int32), "sums": torch.zeros(3, 2, 40)}
    select(q, **good)
    with pytest.raises(TypeError, match=r"starts is torch\.int64; it must be torch\.int32"):
        select(q, **{**good, "starts": good["starts"].long()})
    with pytest.raises(TypeError, match=r"sums is torch\.float16; it must be torch\.float32"):
        select(q, **{**good, "sums": good["sums"].half()})
    with pytest.raises(
        TypeError, match=r"query is torch\.float64; blasst takes float32, float16 and b"
    ):
        select(q.double(), **good)


def test_padding_is_refused():
    model = make_model("llama", blasst_policy={"kind": "dhsa", "budget": 128})
    mask = torch.ones(2, 300, dtype=torch.long)
    mask[1, :60] = 0
    with pytest.raises(ValueError, match="blocks is given together with starts or query_lengths"):
        model(tokens(2), attention_mask=mask)
