"""A calibration beside a model's config.json: written with it, and found again."""

import contextlib
from collections.abc import Iterator
from functools import partial, wraps
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from blasst.config import SparseAttention, parse
from blasst.config.tables import TABLES_FILE, split
from blasst.files import replace_file

CONFIG_KEY = "sparse_attention_config"


def calibration_in(model: nn.Module) -> SparseAttention | None:
    """What a model's configuration says of its sparsity; None: nothing.

    Raises:
        ValueError: it cannot be honoured; the message says why.
    """
    entry = getattr(model.config, CONFIG_KEY, None)
    return None if entry is None else parse(entry, partial(beside, model.config))


def beside(config: PreTrainedConfig, file: str) -> Path:
    """Where a file is that lies beside the config.json that this was loaded from.

    Raises:
        ValueError: nowhere; the message says where it was looked for.
    """
    folder = config.name_or_path
    if folder and Path(folder).is_dir():
        path = Path(folder) / file
        if path.is_file():
            return path
        missing = "it is missing there: copy it with config.json"
    elif folder:
        try:
            return Path(cached_file(folder, file, revision=getattr(config, "_commit_hash", None)))
        except OSError as error:
            missing = str(error).splitlines()[0]
    else:
        missing = "this configuration was not loaded from a folder"
    raise ValueError(
        f"sparse_attention_config has its tables in {file} beside config.json"
        f"{f' of {folder}' if folder else ''}, but {missing}"
    )


def pieces(config: PreTrainedConfig) -> tuple[str, bytes | None]:
    """A configuration as JSON, and the file of tables that belongs beside it."""
    with _split(config) as content:
        return config.to_json_string(), content


def write_pieces(config: PreTrainedConfig, folder: Path) -> None:
    """Replace config.json in a folder, and the file of tables beside it."""
    text, content = pieces(config)
    if content is not None:
        replace_file(folder / TABLES_FILE, content)
    replace_file(folder / "config.json", text)


@contextlib.contextmanager
def _split(config: PreTrainedConfig) -> Iterator[bytes | None]:
    """Inside, the configuration names its tables instead of holding them; yields their file."""
    holder = _holder(config)
    if holder is None:
        yield None
        return
    entry = holder.sparse_attention_config
    if "tables" in (entry.get("blasst") or {}):
        # As it was loaded, and unchanged: the same file goes with it.
        place = entry["blasst"]["tables"]["file"]
        yield beside(config if config.name_or_path else holder, place).read_bytes()
        return
    holder.sparse_attention_config, content = split(entry)
    try:
        yield content
    finally:
        holder.sparse_attention_config = entry


def _holder(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """The configuration with a calibration: the model's, or that of its language part."""
    for one in (config, config.get_text_config()):
        if isinstance(getattr(one, CONFIG_KEY, None), dict):
            return one
    return None


def keep_tables_beside_configs() -> None:
    """Make Transformers write the file of tables where it writes a calibrated configuration.

    Its `save_pretrained` has no place for such a thing. What it does for other models stays as it
    is.
    """
    save = PreTrainedConfig.save_pretrained
    if getattr(save, "keeps_tables", False):
        return

    @wraps(save)
    def save_pretrained(
        self: PreTrainedConfig, save_directory: str | Path, *arguments: Any, **options: Any
    ) -> Any:
        if _holder(self) is None:
            return save(self, save_directory, *arguments, **options)
        with _split(self) as content:
            if content is not None:
                replace_file(Path(save_directory) / TABLES_FILE, content)
            return save(self, save_directory, *arguments, **options)

    save_pretrained.keeps_tables = True
    PreTrainedConfig.save_pretrained = save_pretrained
