"""One call of each work, for a profiler that starts when it is told to.

    ncu --profile-from-start off --clock-control none --kernel-name regex:attend \\
        --section SourceCounters --section WarpStateStats --section SpeedOfLight --export report \\
        python bench/profiled.py decode:64x16384:64/4:128:0.73:fp8
    ncu --import report.ncu-rep --page source --print-source sass --csv

The last command says where the warps of a kernel were, machine instruction by machine instruction,
and what they waited for. Works are those of two_builds.py; BLASST_CUDA_BACKEND chooses the kernels.
"""

import argparse

import torch
from two_builds import make


def main() -> None:
    """Warms each work up, then calls it once under the profiler."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("works", nargs="+", metavar="WORK")
    for work in parser.parse_args().works:
        run = make(work)
        run()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        run()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()
        del run
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
