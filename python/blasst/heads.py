"""How many heads the layers of a model have, which may differ from layer to layer; their size."""

from typing import Any


def config_of_layer(config: Any, layer: int) -> Any:
    """A configuration of Transformers as it stands for one layer."""
    return config.per_layer_config[layer] if getattr(config, "is_heterogeneous", False) else config


def heads_of_layer(config: Any, layer: int) -> int | None:
    """Query heads; None: the configuration does not say."""
    by_layer = getattr(config, "num_attention_heads_per_layer", None)
    if by_layer:
        return by_layer[layer]
    return getattr(config_of_layer(config, layer), "num_attention_heads", None)


def query_size(config: Any) -> int:
    """Elements of a head's query and key.

    `head_dim` of a model with multi-head latent attention is that of the rotary part alone.
    """
    whole = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None)
    return whole or config.hidden_size // config.num_attention_heads


def value_size(config: Any) -> int:
    """Elements of a head's value."""
    return getattr(config, "v_head_dim", None) or query_size(config)


def heads_by_layer(config: Any) -> list[int]:
    """Query heads of every layer."""
    return [heads_of_layer(config, layer) for layer in range(config.num_hidden_layers)]
