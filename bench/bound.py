"""How tight the bound on the dropped mass is, on the recorded tensors of a real model.

bench/record_qkv.py makes the file. The true mass of a row's skipped tiles is 1 - e^(LSE of the kept
tiles - LSE of all), so one dense and one sparse call tell both.
"""

import argparse

import recorded
import torch

import blasst


def main() -> None:
    """Prints a line for each recorded layer and sparsity."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    recorded.add_option(parser)
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.5, 0.75])
    arguments = parser.parse_args()
    for layer, tensors in recorded.load(parser, arguments.recorded).items():
        q, k, v = (t.float() for t in tensors)
        dense = blasst.attention(q, k, v, causal=True, phase="prefill", return_lse=True)
        for sparsity in arguments.sparsity:
            sparse = blasst.attention(
                *(q, k, v),
                causal=True,
                phase="prefill",
                threshold=recorded.threshold_for(sparsity, q, k, v),
                return_lse=True,
                return_stats=True,
                return_error_bound=True,
            )
            mass = -torch.expm1(sparse.lse.double() - dense.lse.double())
            bound = sparse.dropped_mass_bound.double()
            seen = mass > 1e-4  # below that the LSE's own rounding shows
            ratio = (bound / mass)[seen].quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.double))
            below = ", ".join(
                f"{100 * (bound < most).double().mean():.0f} % below {100 * most:g} %"
                for most in (0.01, 0.05, 0.2)
            )
            print(
                f"layer {layer}, {100 * sparse.stats.sparsity:.1f} % skipped: true mass "
                f"{mass.mean():.4f} in the mean, bound {bound.mean():.4f}; bound / mass "
                + " / ".join(f"{r:.1f}" for r in ratio)
                + f" (10th, 50th, 90th percentile of rows); bound of {below}",
                flush=True,
            )


if __name__ == "__main__":
    main()
