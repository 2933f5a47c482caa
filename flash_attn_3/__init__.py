"""FlashAttention-3's package as it is published, for projects that import it by that name.

`flash_attn_3.flash_attn_interface` has the functions, and importing `flash_attn_3._C` makes the
operators `torch.ops.flash_attn_3` known. Both are those of the top-level `flash_attn_interface`.
"""

__version__ = "3.0.0"  # of the published package that has these names
