"""Thresholds for a target sparsity, measured on the model and saved with it.

    python examples/calibrate.py MODEL FOLDER --target-sparsity 0.5

`AutoModelForCausalLM.from_pretrained(FOLDER, attn_implementation="blasst")` then runs
with them. The command `blasst calibrate` does the same with more options.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import blasst


def main() -> None:
    """Writes the calibrated model to the folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("folder")
    parser.add_argument("--target-sparsity", type=float, default=0.5)
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 2048, 4096])
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, attn_implementation="blasst")
    blasst.calibrate(
        model,
        tokenizer,
        lengths=arguments.lengths,
        target_sparsity=arguments.target_sparsity,
        progress=lambda step, share, what: print(f"{share:4.0%} {step}: {what}", flush=True),
    )
    model.save_pretrained(arguments.folder)
    tokenizer.save_pretrained(arguments.folder)
    print(f"{arguments.folder}: calibrated for {arguments.target_sparsity:.0%}")


if __name__ == "__main__":
    main()
