"""Time to first token and decode of a Llama-shaped model with random weights, on one Hopper GPU.

    python bench/models_cuda.py --shape 8b --lengths 8192 32768 131072
    python bench/models_cuda.py --shape 8b --layers 8 --lengths 131072
    python bench/models_cuda.py --shape 8b --layers 8 --lengths --decode-lengths --rounds 100

Random weights have nothing to skip, so sparsity is planted: the keys are the same in every tile, in
some scaled down, and the threshold drops just those. A line is a length and a share of
skipped tiles (by `blasst.record`): time to the first token, the median of warm repeats with the
lowest and highest; attention's share of it, from the calls alone; the time that attention alone
predicts, and how much of the predicted gain over dense is there. Then milliseconds a token of 32
decode steps, captured in a CUDA graph, and microseconds of host time a layer: of the graph's
launch, and of a step without a graph, the rest of the layer included.

With `--rounds`, prompts of `--short-lengths` first, where nothing or little is skipped: in each
round the settings take turns, and a line is a setting's time over that of the dense pass of its
own round: the median, and between which two it lies with 95 %. Dense itself, measured again, shows
what can be told apart.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from thresholds import make_calibration
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

import blasst
from blasst import Threshold
from blasst.hf.operator import KERNELS, calling
from blasst.hf.reading import read
from blasst.ops.attention import attention
from blasst.versions import cache_name

SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip
KEYS = 128
"""In a tile."""
QUIET = 1 / 64
LIMIT = 0.05
"""Threshold: far below a loud tile's best scores, far above a quiet one's."""
STEPS = 32
SPARSITIES = (0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Line:
    """One measurement, in seconds."""

    length: int
    what: str
    skipped: float
    median: float
    lowest: float
    highest: float
    attention: float | None = None
    """Of the calls alone."""
    predicted: float | None = None
    gain_reached: float | None = None
    """Of the predicted gain over dense."""
    replay: float | None = None
    """Of the host, a layer, to launch a captured step."""
    eager: float | None = None
    """Of the host, a layer, for a step without a graph."""
    of_dense: tuple[float, float, float] | None = None
    """Times over those of dense in the same round: the median, and between which two it lies."""


class Planted:
    """`blasst.attention` on keys of its own: the same in every tile, quiet in some.

    So no row's best score in a loud tile is below another's. Made once, for all layers: a call
    copies nothing. Dense calls get the same keys, whose products cost the same power.
    """

    tile_of = staticmethod(KERNELS.tile_of)

    def __init__(self, sparsity: float, longest: int, model: PreTrainedModel) -> None:
        config, tiles = model.config, -(-longest // KEYS)
        generator = torch.Generator("cuda").manual_seed(0)
        loud = torch.rand(tiles, generator=generator, device="cuda") >= sparsity
        loud[0] = True
        tile = torch.randn(KEYS, config.num_key_value_heads, config.head_dim,
                           generator=generator, device="cuda")  # fmt: skip
        scale = torch.where(loud, 1.0, QUIET)[:, None, None, None]
        self._keys = (tile * scale).flatten(0, 1)[None].to(model.dtype)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """As `blasst.attention`, of which it takes everything but the keys."""
        scale = 16 * q.shape[-1] ** -0.5  # apart enough for a small threshold
        return attention(q, self.keys(k), v, **{**options, "scale": scale})

    def keys(self, k: Tensor) -> Tensor:
        """In place of the model's."""
        return self._keys[:, : k.shape[1]]


def make_model(shape: str, layers: int | None, longest: int, **more: Any) -> PreTrainedModel:
    """Of random weights, bfloat16, on the GPU.

    more: of its configuration.
    """
    sizes = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers}) | more
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=longest + STEPS, **sizes)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(
            config, attn_implementation="blasst", dtype=torch.bfloat16
        )
    return model.eval()


def seconds(run: Callable[[], object], repeats: int) -> list[float]:
    """Of a warm run, repeated, ascending."""
    run()
    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = perf_counter()
        run()
        torch.cuda.synchronize()
        found.append(perf_counter() - began)
    return sorted(found)


def host_seconds(run: Callable[[], object]) -> float:
    """Until a run returns on an idle device, the median."""
    found = []
    for _ in range(STEPS):
        torch.cuda.synchronize()
        began = perf_counter()
        run()
        found.append(perf_counter() - began)
    return statistics.median(found)


def first_token(model: PreTrainedModel, ids: Tensor, chunk: int | None) -> Tensor:
    """The logits after a prompt."""
    hidden = read(model, ids, DynamicCache(config=model.config), chunk)
    return model.lm_head(hidden[:, -1:])


def attention_alone(
    model: PreTrainedModel, length: int, chunk: int, operator: Any, threshold: float | None
) -> float:
    """Seconds of all layers' calls of a prompt."""
    config = model.config
    shape = (1, length, config.num_attention_heads, config.head_dim)
    q = torch.randn(shape, device="cuda", dtype=model.dtype)
    k, v = torch.randn(2, 1, length, config.num_key_value_heads, config.head_dim,
                       device="cuda", dtype=model.dtype)  # fmt: skip

    def calls() -> None:
        for start in range(0, length, chunk):
            end = min(start + chunk, length)
            operator.attention(
                q[:, start:end], k[:, :end], v[:, :end], causal=True, threshold=threshold
            )

    return config.num_hidden_layers * statistics.median(seconds(calls, 3))


def measure(model: PreTrainedModel, length: int, chunk: int, repeats: int) -> list[Line]:
    """One length."""
    ids = torch.randint(0, 32000, (1, length), device="cuda")
    model.set_attn_implementation("sdpa")
    times = seconds(lambda: first_token(model, ids, None), repeats)
    lines = [Line(length, "torch sdpa", 0.0, statistics.median(times), times[0], times[-1])]
    model.set_attn_implementation("blasst")
    dense = dense_alone = 0.0
    for sparsity in (0.0, *SPARSITIES):
        operator = Planted(sparsity, length, model)
        limit = LIMIT if sparsity else None
        blasst.configure(model, prefill=Threshold(limit))
        with calling(operator):
            with blasst.record() as recording:
                first_token(model, ids, chunk)
            times = seconds(lambda: first_token(model, ids, chunk), repeats)
        alone = attention_alone(model, length, chunk, operator, limit)
        found, reached = statistics.median(times), None
        if not sparsity:
            dense, dense_alone = found, alone
        predicted = dense - dense_alone + alone
        if sparsity:
            reached = (dense - found) / (dense - predicted)
        skipped = recording.sparsity("prefill")
        what = "blasst" if sparsity else "blasst, dense"
        lines.append(
            Line(length, what, skipped, found, times[0], times[-1], alone, predicted, reached)
        )
    return lines


def short(model: PreTrainedModel, length: int, rounds: int) -> list[Line]:
    """One length, at which settings that skip nothing or little take turns with dense."""
    ids = torch.randint(0, 32000, (1, length), device="cuda")
    config = model.config
    calibration = make_calibration(config.num_hidden_layers, config.num_attention_heads, "prefill")
    config.sparse_attention_config = calibration.to_dict()
    model.set_attn_implementation("blasst")
    loud, some = Planted(0.0, length, model), Planted(0.1, length, model)
    settings = {
        "blasst, dense": (loud, Threshold(None)),
        "dense again": (loud, Threshold(None)),
        "a threshold": (loud, Threshold(LIMIT)),
        "calibrated": (loud, None),
        "little skipped": (some, Threshold(LIMIT)),
    }
    times = {what: [] for what in settings}
    skipped = {}
    for turn in range(rounds):
        for i in range(len(settings)):
            what = [*settings][(turn + i) % len(settings)]
            operator, threshold = settings[what]
            blasst.reset(model)  # to the calibration's thresholds
            if threshold is not None:
                blasst.configure(model, prefill=threshold)
            with calling(operator):
                if turn == 0:
                    with blasst.record() as recording:
                        first_token(model, ids, None)
                    skipped[what] = recording.sparsity("prefill")
                # Of a warm pass: the one before it works out what a setting needs once.
                times[what] += seconds(lambda: first_token(model, ids, None), 1)
    blasst.reset(model)
    del config.sparse_attention_config
    dense = times["blasst, dense"]
    return [
        Line(length, what, skipped[what], *middle(found), of_dense=middle_of_ratios(found, dense))
        for what, found in times.items()
    ]


def middle(values: list[float]) -> tuple[float, float, float]:
    """Median, lowest and highest."""
    return statistics.median(values), min(values), max(values)


def middle_of_ratios(values: list[float], others: list[float]) -> tuple[float, float, float]:
    """The median of ratios, and the two of them between which it lies with 95 %."""
    ratios = sorted(a / b for a, b in zip(values, others, strict=True))
    count, off = len(ratios), 0.98 * len(ratios) ** 0.5
    low, high = max(0, int(count / 2 - off)), min(count - 1, int(count / 2 + off))
    return statistics.median(ratios), ratios[low], ratios[high]


def decode(model: PreTrainedModel, length: int, repeats: int) -> Iterator[Line]:
    """A token after a prompt, captured in a graph."""
    token = torch.zeros(1, 1, dtype=torch.int64, device="cuda")
    position = torch.full((1, 1), length, device="cuda")
    name = cache_name(type(model))
    model.set_attn_implementation("sdpa")
    cache = StaticCache(config=model.config, max_cache_len=length + STEPS)
    model(token, **{name: cache})  # makes the cache's tensors
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()

    def start() -> None:
        position.fill_(length)
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)

    def step() -> None:
        model(token, position_ids=position, **{name: cache})
        position.add_(1)

    layers = model.config.num_hidden_layers

    def measured(what: str, skipped: float) -> Line:
        start()
        with torch.cuda.stream(torch.cuda.Stream()):
            step()  # what is made once, before the capture
        torch.cuda.synchronize()
        start()
        eager = host_seconds(step) / layers
        torch.cuda.synchronize()
        start()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()

        def steps() -> None:
            start()
            for _ in range(STEPS):
                graph.replay()

        times = [t / STEPS for t in seconds(steps, repeats)]
        start()
        replay = host_seconds(graph.replay) / layers
        found = statistics.median(times), times[0], times[-1]
        return Line(length, what, skipped, *found, replay=replay, eager=eager)

    yield measured("decode, torch sdpa", 0.0)
    model.set_attn_implementation("blasst")
    for sparsity in (0.0, *SPARSITIES):
        blasst.configure(model, decode=Threshold(LIMIT if sparsity else None))
        with calling(Planted(sparsity, length + STEPS, model)):
            start()
            with blasst.record() as recording:
                step()
            what = "decode, blasst" if sparsity else "decode, blasst, dense"
            yield measured(what, recording.sparsity("decode"))
    blasst.reset(model)
    calibration = make_calibration(layers, model.config.num_attention_heads)
    model.config.sparse_attention_config = calibration.to_dict()
    start()
    with blasst.record() as recording:
        step()
    yield measured("decode, calibrated", recording.sparsity("decode"))
    del model.config.sparse_attention_config


def shown(line: Line) -> str:
    """For a terminal."""
    text = (
        f"{line.length:7d}  {line.what:24s} {line.skipped:6.1%}  {1e3 * line.median:10.2f} ms "
        f"({1e3 * line.lowest:.2f} to {1e3 * line.highest:.2f})"
    )
    if line.attention is not None:
        text += f"  attention {line.attention / line.median:.0%}"
    if line.gain_reached is not None:
        text += f"  predicted {1e3 * line.predicted:.2f} ms, {line.gain_reached:.0%} of the gain"
    if line.of_dense is not None:
        middle, low, high = (100 * (ratio - 1) for ratio in line.of_dense)
        text += f"  {middle:+.2f} % of dense ({low:+.2f} to {high:+.2f})"
    if line.replay is not None:
        text += f"  host {1e6 * line.replay:.1f} us a layer, {1e6 * line.eager:.0f} without a graph"
    return text


@torch.inference_mode()
def main() -> None:
    """Measure, print, and write as JSON."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--shape", choices=SHAPES, default="8b")
    options.add_argument("--layers", type=int)
    options.add_argument("--lengths", type=int, nargs="*", default=[8192, 32768, 131072])
    options.add_argument("--decode-lengths", type=int, nargs="*", default=[32768, 131072])
    options.add_argument("--short-lengths", type=int, nargs="*", default=[1024, 2048, 4096])
    options.add_argument("--rounds", type=int, default=0)
    options.add_argument("--chunk", type=int, default=8192)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    shorts = given.short_lengths if given.rounds else []
    longest = max([*given.lengths, *given.decode_lengths, *shorts])
    model = make_model(given.shape, given.layers, longest)
    work = [
        *(partial(short, model, length, given.rounds) for length in shorts),
        *(partial(measure, model, length, given.chunk, given.repeats) for length in given.lengths),
        *(partial(decode, model, length, given.repeats) for length in given.decode_lengths),
    ]
    lines = []
    for line in chain.from_iterable(one() for one in work):
        print(shown(line), flush=True)
        lines.append(line)
    if given.out is not None:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        given.out.write_text(json.dumps({**about, "lines": [asdict(line) for line in lines]}))


if __name__ == "__main__":
    main()
