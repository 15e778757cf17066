"""A model from Transformers, made sparse: prompt in, answer and skipped share out.

    python examples/generate.py MODEL TEXT

MODEL is a folder or a hub name, TEXT a file of several thousand tokens. Runs on a GPU if there is
one, else on the CPU.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import blasst


def main() -> None:
    """Prints the continuation of the text, and what was skipped on the way."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--threshold", type=float, default=0.01, help="0: dense; 1: skips most")
    parser.add_argument("--new-tokens", type=int, default=30)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model,
        dtype=torch.bfloat16 if device == "cuda" else "auto",
        attn_implementation="blasst",
    ).to(device)
    threshold = blasst.Threshold(arguments.threshold)
    blasst.configure(model, prefill=threshold, decode=threshold)
    inputs = tokenizer(arguments.text.read_text(), return_tensors="pt").to(device)
    with blasst.record() as record:
        tokens = model.generate(**inputs, max_new_tokens=arguments.new_tokens, do_sample=False)
    length = inputs.input_ids.shape[1]
    print(tokenizer.decode(tokens[0, length:], skip_special_tokens=True))
    print(
        f"{length} tokens; skipped: prefill {record.sparsity('prefill'):.0%}, "
        f"decode {record.sparsity('decode'):.0%}"
    )


if __name__ == "__main__":
    main()
