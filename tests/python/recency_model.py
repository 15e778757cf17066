"""A small random Llama whose heads prefer near keys, so that far tiles can be skipped."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from blasst.hf.models import Loaded


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def make_recency_model(context: int = 1024, head_dim: int = 16) -> LlamaForCausalLM:
    """Two layers of four heads; the same weights each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=context,
        attention_bias=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=0,
        attn_implementation="blasst",
    )
    model = LlamaForCausalLM(config).eval()
    strength = torch.tensor([2.0, 3.0, 4.0, 5.0]).repeat_interleave(head_dim)
    with torch.no_grad():
        for layer in model.model.layers:
            # q and k nearly constant: a score then falls with the distance, through the rotation.
            layer.self_attn.q_proj.bias.copy_(strength)
            layer.self_attn.k_proj.bias.copy_(torch.ones(2 * head_dim))
    return model


def make_loaded(folder: str = "") -> Loaded:
    """Model and tokenizer as `models.load` returns them."""
    return Loaded("tiny", make_recency_model(), make_tokenizer(), folder)
