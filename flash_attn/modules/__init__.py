"""Attention modules: `flash_attn.modules.mha`."""
