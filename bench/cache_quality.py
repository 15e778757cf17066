"""What a cache in 8 bits costs a model: perplexity and agreement of what is read over it.

    python bench/cache_quality.py smollm2 --length 2048 --prompt 512

The first --prompt tokens of each text are read at once, which fills the cache and attends to exact
keys and values; the rest is read over the cache, in one chunk and by --scores, and compared with
the same over a cache in the model's own type by exact scores. Prints a line for each kind of cache:
the mean over the texts, and the standard error of the mean.
"""

import argparse
import statistics

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

import blasst
from blasst.config import SCORES
from blasst.hf.models import Loaded, Loading, load
from blasst.hf.thresholds import dense_on_purpose
from blasst.measure.agreement import DenseRun
from blasst.prompts.maker import evaluation_texts
from blasst.versions import cache_name

KINDS = {
    "int8 keys": {"keys": "int8", "values": None},
    "int8": {"keys": "int8", "values": "int8"},
    "int8, not centred": {"keys": "int8", "values": "int8", "center": False},
    "int8 keys, fp8 values": {"keys": "int8", "values": "fp8"},
    "fp8": {"keys": "fp8", "values": "fp8"},
}


def read(
    loaded: Loaded, tokens: Tensor, prompt: int, cache: Cache, scores: str = "exact"
) -> Tensor:
    """[tokens, hidden] of those behind the prompt."""
    model = loaded.model
    body = model.get_decoder()
    name = cache_name(type(body))
    body(tokens[:, :prompt], **{name: cache})
    with blasst.configure(model, prefill=blasst.Threshold(scores=scores)):
        return body(tokens[:, prompt:], **{name: cache}).last_hidden_state[0]


@torch.inference_mode()
def main() -> None:
    """Measure every kind of cache."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--texts", type=int, default=5)
    parser.add_argument("--scores", default="exact", choices=SCORES)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    loaded = load(arguments.model, loading=Loading(device=arguments.device))
    found: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in KINDS}
    for text in list(evaluation_texts().values())[: arguments.texts]:
        ids = loaded.tokenizer(text, return_tensors="pt").input_ids[:, : arguments.length]
        ids = ids.to(arguments.device)
        with dense_on_purpose():
            hidden = read(loaded, ids, arguments.prompt, DynamicCache(config=loaded.model.config))
            dense = DenseRun(loaded.model, hidden, ids[0, arguments.prompt :])
            for kind, options in KINDS.items():
                cache = blasst.eight_bit_cache(loaded.model, **options)
                hidden = read(loaded, ids, arguments.prompt, cache, arguments.scores)
                a = dense.compare(hidden)
                change = 100 * (a.perplexity / a.dense_perplexity - 1)
                found[kind].append((change, 100 * a.top1, a.kl))
    print(f"{'cache':24} {'perplexity':>18} {'top-1':>18} {'KL':>8}")
    for kind, rows in found.items():
        columns = [
            (statistics.mean(c), statistics.stdev(c) / len(c) ** 0.5)
            for c in zip(*rows, strict=True)
        ]
        (change, change_error), (top1, top1_error), (kl, _) = columns
        print(
            f"{kind:24} {change:+7.2f} ± {change_error:4.2f} % {top1:7.2f} ± {top1_error:4.2f} % "
            f"{kl:8.5f}"
        )


if __name__ == "__main__":
    main()
