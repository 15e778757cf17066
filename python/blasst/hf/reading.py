"""Reading tokens with a model, for its last hidden states: its output layer is left out."""

from torch import Tensor
from transformers import Cache, PreTrainedModel

from blasst.versions import cache_name


def read(model: PreTrainedModel, tokens: Tensor, cache: Cache | None = None) -> Tensor:
    """Read tokens that follow those in the cache, which takes them up.

    Args:
        model: with or without its output layer.
        tokens: [batch, length] int64, on any device.
        cache: of what was read before; None: the tokens are read alone, and not kept.

    Returns:
        [batch, length, hidden] last hidden states.

    Raises:
        ValueError: the model takes no cache.
    """
    body = model.base_model
    kept = {"use_cache": False} if cache is None else {cache_name(type(body)): cache}
    return body(tokens.to(body.device), **kept).last_hidden_state
