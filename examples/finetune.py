"""Training under the sparsity that a model will run with, in a loop of one's own.

    python examples/finetune.py MODEL TEXT FOLDER

The forward applies the tile test; the backward treats every skipped tile as absent and pays nothing
for it. `blasst finetune` is the command with schedules, checkpoints and an evaluation.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import blasst


def main() -> None:
    """Writes the trained model to the folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("folder")
    parser.add_argument("--threshold", type=float, default=0.01)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation="blasst"
    )
    blasst.configure(model, prefill=blasst.Threshold(arguments.threshold))
    ids = tokenizer(arguments.text.read_text(), return_tensors="pt").input_ids
    if ids.shape[1] < arguments.length:
        parser.error(f"--length is {arguments.length}; the text has {ids.shape[1]} tokens")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model.train()
    for step in range(arguments.steps):
        start = int(torch.randint(ids.shape[1] - arguments.length + 1, ()))
        batch = ids[:, start : start + arguments.length]
        with blasst.record() as record:
            loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}, {record.sparsity('prefill'):.0%} skipped")
    model.save_pretrained(arguments.folder)
    tokenizer.save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()
