"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from blasst.cli.parsing import FRACTION, POSITIVE, Choice, shape
from blasst.config import HEAD_SCHEMES, SCORES

Model = Annotated[str, Argument(metavar="MODEL", help="smollm2, gemma3, a folder or a hub name")]
PromptText = Annotated[
    Path | None, Option("--text", metavar="FILE", help="make the prompts from this text")
]
PromptSource = Annotated[
    Path | None,
    Option("--text", metavar="FILE", help="make the prompts from this text, or records (.jsonl)"),
]
Targets = Annotated[
    list[float] | None,
    Option(
        parser=FRACTION,
        metavar="S ...",
        help="shares of the tiles to skip; the first becomes the configuration's (default: 0.5)",
    ),
]
Prompts = Annotated[int, Option(parser=POSITIVE, metavar="N", help="how many")]
Length = Annotated[int, Option(parser=POSITIVE, metavar="TOKENS", help="of a prompt or text")]
Every = Annotated[
    int,
    Option(parser=POSITIVE, metavar="N", help="compare texts with dense at every N-th position"),
]
Lengths = Annotated[
    list[int] | None,
    Option(
        parser=POSITIVE,
        metavar="TOKENS ...",
        help="of prompts (default: to the model's context, on the CPU to 4096)",
    ),
]
HeldOut = Annotated[
    list[int] | None,
    Option(
        parser=POSITIVE,
        metavar="TOKENS ...",
        help="lengths to check (default: half-way between the two longest, and twice the longest)",
    ),
]
OtherLengths = Annotated[
    list[int] | None,
    Option(
        parser=POSITIVE,
        metavar="TOKENS ...",
        help="where only sparsity is measured (default: four shorter ones)",
    ),
]
TimedLengths = Annotated[
    list[int] | None,
    Option(
        parser=POSITIVE,
        metavar="TOKENS ...",
        help="of prompts whose prefill is timed (default: a quarter, half and all of --length)",
    ),
]
NeedleLengths = Annotated[
    list[int] | None,
    Option(
        parser=POSITIVE,
        metavar="TOKENS ...",
        help="of prompts with a fact to find (default: half and all of --length)",
    ),
]
Folder = Annotated[Path, Option("--out", metavar="FOLDER", help="of all results")]
EvaluatedTargets = Annotated[
    list[float] | None,
    Option(
        parser=FRACTION,
        metavar="S ...",
        help="shares of the tiles to skip; 0: dense (default: 0 0.25 0.5 0.65 0.75 0.85)",
    ),
]
EvaluatedScores = Annotated[
    list[str] | None,
    Option(
        parser=Choice(SCORES),
        metavar="KIND ...",
        help=f"of prefill under the calibrated thresholds: {', '.join(SCORES)} (default: those it "
        "was calibrated with)",
    ),
]
Tasks = Annotated[
    list[str] | None,
    Option(
        metavar="TASK ...",
        help="of lm-eval; those of RULER without questions or essays need no download "
        "(default: none)",
    ),
]
Texts = Annotated[
    list[str] | None,
    Option(
        metavar="FILE ...",
        help="texts for perplexity (default: five that come with Python and its packages)",
    ),
]
FinalTarget = Annotated[
    float, Option(parser=FRACTION, metavar="S", help="share of the tiles to skip at the end")
]
StartTarget = Annotated[float, Option(parser=FRACTION, metavar="S", help="share at the first step")]
Distill = Annotated[
    bool,
    Option(
        "--distill",
        help="learn the untrained model's predictions, not the texts' tokens; nothing is trained "
        "densely",
    ),
]
TrainingText = Annotated[
    Path | None,
    Option(metavar="FILE", help="train on this text, without its last fifth, which is held out"),
]
Schemes = Annotated[
    list[str] | None,
    Option(
        parser=Choice(HEAD_SCHEMES),
        metavar="SCHEME ...",
        help=f"ways to share thresholds out among heads: {', '.join(HEAD_SCHEMES)} (default: all)",
    ),
]
Chunk = Annotated[
    int,
    Option(parser=POSITIVE, metavar="TOKENS", help="of a prompt that are read at once"),
]
Batch = Annotated[int, Option(parser=POSITIVE, metavar="N", help="prompts read at once")]
Tile = Annotated[
    str | None,
    Option(
        "--tile-shape",
        parser=shape,
        metavar="ROWSxKEYS|DEVICE",
        help="tiles that the thresholds are for: a size, or those of a device's kernels "
        "(default: those of this device)",
    ),
]
ConfigOnly = Annotated[
    bool, Option("--config-only", help="write the configuration without the weights")
]
Device = Annotated[
    # Named: typer before 0.29 takes a metavar that is the argument's name in capitals for its name.
    str | None,
    Option("--device", metavar="DEVICE", help="where the model runs: cpu (default), cuda, cuda:N"),
]
Dtype = Annotated[
    str,
    Option(
        metavar="TYPE",
        help="of the weights: auto (as stored; on a GPU bfloat16 in place of float32), float32, "
        "bfloat16 or float16",
    ),
]
DeviceMap = Annotated[
    str | None, Option(metavar="MAP", help="spread the model as accelerate does: auto")
]
Revision = Annotated[
    str | None, Option(metavar="NAME", help="branch, tag or commit of a hub model")
]
TrustRemoteCode = Annotated[
    bool, Option("--trust-remote-code", help="run Python code that comes with the model")
]
