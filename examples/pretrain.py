"""Example: training a small model from scratch, dense and with a band of distances per head.

The text is made here or comes with every installation: licences and documentation of Python, of its
packages and of the system, and generated facts that are asked for again later on. All of it goes
through a tokenizer that is trained on it; nothing is downloaded, nothing is kept but checkpoints.
"""

import io
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from typer import Option

from blasst import prompts
from blasst.cli.console import console, shown_progress
from blasst.files import ROOM, check_folder, replace_file, write_json
from blasst.hf import NAME
from blasst.hf.weights import weights_size
from blasst.policies import Bands
from blasst.progress import Progress, silent

METHODS = ("dense", "bands")
VOCABULARY = 4096
SYSTEM_TEXTS = (Path("/usr/share/doc"), Path("/usr/share/common-licenses"))
MOST_OF_A_FILE = 40_000
"""Characters: a file that repeats itself shall not fill the text."""
FACTS = 12
"""Generated facts between two stretches of the other text."""
STRETCH = 8_000
"""Characters of such a stretch."""
MOST_TEXT = 6_000_000
"""Characters taken of the stretches, in all."""
HELD_OUT = 0.05
"""Share of the text, at its end, that is not trained on."""
WINDOWS = 8
"""Held-out stretches that the loss is measured on."""


@dataclass(frozen=True)
class PretrainingPlan:
    """One training run."""

    length: int = 2048
    """Tokens of a sequence."""
    batch: int = 1
    """Sequences a step."""
    steps: int = 400
    every: int = 50
    """Steps between two measurements of the held-out loss; a checkpoint follows each."""
    learning_rate: float = 1e-3
    hidden: int = 288
    heads: int = 9
    layers: int = 9
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("length", "batch", "steps", "every", "hidden", "heads", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.hidden % self.heads or self.hidden // self.heads not in range(16, 257, 8):
            raise ValueError(
                f"hidden is {self.hidden} for {self.heads} heads; each needs a multiple of 8 from "
                "16 to 256"
            )
        Bands(self.length).of(self.heads)


def corpus(seed: int = 0) -> str:
    """The text: what is at hand, in stretches, and between them facts and questions about them."""
    texts = [prompts.reference_text(), *prompts.evaluation_texts().values(), *_system_texts()]
    stretches = [t[at : at + STRETCH] for t in texts for at in range(0, len(t), STRETCH)]
    rng = random.Random(seed)
    rng.shuffle(stretches)
    del stretches[MOST_TEXT // STRETCH :]
    parts: list[str] = []
    known: dict[str, str] = {}
    for stretch in stretches:
        lines = []
        for _ in range(FACTS):
            if known and rng.random() < 0.5:
                place = rng.choice(list(known))
                lines.append(f"{prompts.QUESTION.format(place=place)} {known[place]}\n")
            else:
                place, known[place] = (name := prompts.a_place(rng)), prompts.a_phrase(rng)
                lines.append(prompts.NEEDLE.format(place=name, phrase=known[name]) + "\n")
        parts += [stretch.strip(), "\n\n", *lines, "\n"]
    return "".join(parts)


def _system_texts() -> Iterator[str]:
    """Licences and documentation of the system, each text once."""
    seen = set()
    for folder in SYSTEM_TEXTS:
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if not path.is_file() or path.suffix in (".gz", ".png", ".html", ".svg"):
                continue
            text = path.read_bytes()[:MOST_OF_A_FILE].decode("utf-8", "ignore")
            if len(text) > 500 and "\0" not in text and hash(text) not in seen:
                seen.add(hash(text))
                yield text


def make_tokenizer(text: str) -> Tokenizer:
    """Byte-level pairs, learned from the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return tokenizer


def make_model(plan: PretrainingPlan, method: str) -> LlamaForCausalLM:
    """An untrained model; the same weights for every method."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=plan.hidden,
        intermediate_size=plan.hidden * 8 // 3 // 8 * 8,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.heads,
        max_position_embeddings=plan.length,
        tie_word_embeddings=True,
        use_cache=False,
    )
    if method == "bands":
        config.blasst_policy = Bands(plan.length).to_dict()
    config._attn_implementation = NAME
    torch.manual_seed(plan.seed)
    return LlamaForCausalLM(config)


class Run:
    """One method's training: steps, losses, and a checkpoint that it goes on from."""

    def __init__(self, plan: PretrainingPlan, method: str, tokens: Tensor, out: Path) -> None:
        self.plan, self.method = plan, method
        held_out = int(len(tokens) * (1 - HELD_OUT))
        self._train, self._held_out = tokens[:held_out], tokens[held_out:]
        needed = plan.length + 1
        if min(len(self._train), len(self._held_out)) < needed + WINDOWS:
            raise ValueError(
                f"the text has {len(tokens)} tokens, {len(self._held_out)} of them held out; "
                f"sequences of {plan.length} need at least {needed + WINDOWS} held out"
            )
        self.model = make_model(plan, method)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=plan.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            fused=True,
        )
        self.step = 0
        self.losses: list[float] = []
        """Of each step."""
        self.held_out: list[tuple[int, float]] = []
        """Step and held-out loss, nats a token."""
        self.seconds = 0.0
        """Spent in steps."""
        self._path = out / f"{method}.safetensors"
        if self._path.exists():
            self._resume()

    @property
    def made_by(self) -> str:
        """What a checkpoint must agree with; more steps may follow."""
        return json.dumps({**asdict(self.plan), "steps": None, "every": None})

    def _resume(self) -> None:
        data = self._path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        about = json.loads(data[8 : 8 + size])["__metadata__"]
        if about["made_by"] != self.made_by:
            raise ValueError(
                f"{self._path} is a checkpoint of another run, {about['made_by']}; choose another "
                "folder, or the same options"
            )
        kept = load(data)
        self.model.load_state_dict(
            {k.removeprefix("model."): v for k, v in kept.items() if k.startswith("model.")},
            strict=False,  # tied weights are kept once
        )
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in kept.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        history = json.loads(about["history"])
        self.step, self.seconds = history["step"], history["seconds"]
        self.losses = history["losses"]
        self.held_out = [tuple(point) for point in history["held_out"]]

    def save(self) -> None:
        """The checkpoint, whole or not at all."""
        kept = {f"model.{n}": p.detach().contiguous() for n, p in self.model.named_parameters()}
        for index, state in self.optimizer.state_dict()["state"].items():
            kept |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
        history = {
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
            "held_out": self.held_out,
        }
        about = {"made_by": self.made_by, "history": json.dumps(history)}
        replace_file(self._path, save(kept, metadata=about))

    def train_step(self) -> None:
        """One step, and what is due after it."""
        if not self.held_out:
            self._measure()
        begun = time.perf_counter()
        self._one_step()
        self.seconds += time.perf_counter() - begun
        if self.step % self.plan.every == 0 or self.step == self.plan.steps:
            self._measure()
            self.save()

    def _one_step(self) -> None:
        plan = self.plan
        warm = min(1.0, (self.step + 1) / 30)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.learning_rate * warm
        # The same sequences for every method.
        rng = torch.Generator().manual_seed(plan.seed + 7919 * (self.step + 1))
        first = torch.randint(len(self._train) - plan.length, (plan.batch, 1), generator=rng)
        tokens = self._train[first + torch.arange(plan.length)]
        self.model.train()
        loss = self.model(tokens, labels=tokens).loss
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.losses.append(loss.item())

    @torch.no_grad()
    def _measure(self) -> None:
        self.model.eval()
        room = len(self._held_out) - self.plan.length
        losses = []
        for i in range(WINDOWS):
            first = i * room // WINDOWS
            tokens = self._held_out[None, first : first + self.plan.length]
            losses.append(self.model(tokens, labels=tokens).loss.item())
        self.held_out.append((self.step, sum(losses) / len(losses)))

    @property
    def is_measured(self) -> bool:
        """Whether the held-out loss is that of the last step."""
        return self.held_out[-1][0] == self.step

    @property
    def tokens_per_second(self) -> float:
        """Of the steps, measurements aside."""
        return self.step * self.plan.batch * self.plan.length / max(self.seconds, 1e-9)

    def summary(self) -> dict[str, Any]:
        """For the results file."""
        return {
            "method": self.method,
            "step": self.step,
            "loss": self.held_out[-1][1],
            "perplexity": math.exp(self.held_out[-1][1]),
            "tokens_per_second": self.tokens_per_second,
            "losses": self.losses,
            "held_out": self.held_out,
        }


def pretrain(plan: PretrainingPlan, out: Path, progress: Progress = silent) -> list[Run]:
    """Train dense and with bands to the same number of steps; write results and a plot into `out`.

    Both are written anew after each measurement, so a run that is stopped has them too. The same
    call goes on where an interrupted one stopped, from its last checkpoints.

    Raises:
        ValueError: too little text, or a checkpoint of another run in `out`.
    """
    checkpoint = 3 * weights_size(make_model(plan, METHODS[0]))  # Adam keeps two numbers a weight
    check_folder(out, ROOM + checkpoint * (len(METHODS) + 1))
    progress("text", 0.0, "")
    text = corpus(plan.seed)
    tokenizer = make_tokenizer(text)
    tokens = torch.tensor(tokenizer.encode(text).ids)
    progress("text", 1.0, f"{len(tokens)} tokens")
    runs = [Run(plan, method, tokens, out) for method in METHODS]
    # Step by step in turns, so that a machine that slows down slows all.
    while (run := min(runs, key=lambda r: r.step)).step < plan.steps:
        run.train_step()
        now = f"step {run.step}, loss {run.losses[-1]:.3f}"
        progress(run.method, run.step / plan.steps, now)
        if run is runs[-1] and run.is_measured:
            _write_results(runs, out)
    _write_results(runs, out)
    return runs


def _write_results(runs: list[Run], out: Path) -> None:
    write_json(out / "results.json", [run.summary() for run in runs])
    replace_file(out / "losses.png", plot(runs))


def plot(runs: list[Run]) -> bytes:
    """Loss by step and by time, as PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(8.4, 4.2), sharey=True)
    for run, colour in zip(runs, ("tab:gray", "tab:blue"), strict=True):
        steps, losses = zip(*run.held_out, strict=True)
        label = f"{run.method}, {run.tokens_per_second:.0f} tokens/s"
        smooth = [sum(run.losses[max(0, i - 20) : i + 1]) / min(i + 1, 21)
                  for i in range(len(run.losses))]  # fmt: skip
        by_step.plot(range(1, len(smooth) + 1), smooth, color=colour, alpha=0.35)
        by_step.plot(steps, losses, "o-", color=colour, label=label, markersize=3)
        each = run.seconds / max(run.step, 1) / 60
        by_time.plot([s * each for s in steps], losses, "o-", color=colour, markersize=3)
    by_step.set(xlabel="step", ylabel="loss, nats a token (points: held out)")
    by_time.set(xlabel="minutes of training")
    by_step.legend()
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    plt.close(figure)
    return buffer.getvalue()


def main(
    steps: Annotated[int, Option(min=1, help="of each")] = 400,
    batch: Annotated[int, Option(min=1, help="sequences a step")] = 1,
    length: Annotated[int, Option(min=1, help="tokens of a sequence")] = 2048,
    every: Annotated[int, Option(min=1, help="steps a checkpoint")] = 50,
    out: Annotated[Path, Option(help="folder of results")] = Path("blasst-pretraining"),
) -> None:
    """Train a small model from scratch, dense and with bands, and compare the two."""
    plan = PretrainingPlan(length=length, batch=batch, steps=steps, every=every)
    with shown_progress() as progress:
        runs = pretrain(plan, out, progress)
    parameters = sum(p.numel() for p in runs[0].model.parameters())
    console.print(f"{parameters / 1e6:.1f}M parameters, {batch * length} tokens a step")
    for run in runs:
        loss = run.held_out[-1][1]
        console.print(
            f"{run.method}: {run.step} steps, held-out loss {loss:.3f}, "
            f"{run.tokens_per_second:.0f} tokens/s"
        )
    console.print(f"Loss curves: {(out / 'losses.png').resolve()}")


if __name__ == "__main__":
    typer.run(main)
