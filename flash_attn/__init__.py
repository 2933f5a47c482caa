"""Exact attention for PyTorch: the `flash_attn` 2.8.3 interface."""

try:
    import torch as _torch  # noqa: F401 (only to say so where it is missing)
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    # Under this name, so that `python -m flash_attn` ends in one line and not in a traceback.
    raise ImportError(
        "flash_attn needs torch 2.4 or later, which is not installed: `pip install torch`",
        name=__name__,
    ) from None

from flash_attn import _sdpa
from flash_attn._version import __version__
from flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

_sdpa.make_known()

__all__ = [
    "__version__",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
