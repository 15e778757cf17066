"""Makes `attn_implementation="blasst"` known to Transformers."""

from transformers import AttentionInterface, AttentionMaskInterface

from blasst.hf.forward import attention_forward
from blasst.hf.layers import NAME
from blasst.hf.masks import key_ranges
from blasst.hf.positions import hand_positions_to_masks
from blasst.hf.reachable import refuse_unreachable_models
from blasst.hf.saving import keep_tables_beside_configs

AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, key_ranges)
hand_positions_to_masks()
keep_tables_beside_configs()
refuse_unreachable_models()
