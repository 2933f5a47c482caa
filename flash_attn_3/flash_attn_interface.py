"""The functions of the top-level module of this name, and the private names that others import."""

from flash_attn_interface import *  # noqa: F403
from flash_attn_interface import (  # noqa: F401
    _flash_attn_backward,
    _flash_attn_forward,
    flash_attn_3_cuda,
    flash_attn_3_gpu,
)
