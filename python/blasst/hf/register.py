"""Makes `attn_implementation="blasst"` known to Transformers."""

from transformers import AttentionInterface, AttentionMaskInterface

from blasst.hf.class_tables import refuse_in_class_tables
from blasst.hf.forward import attention_forward
from blasst.hf.layers import NAME
from blasst.hf.masks import key_ranges
from blasst.hf.saving import keep_tables_beside_configs

AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, key_ranges)
keep_tables_beside_configs()
refuse_in_class_tables()
