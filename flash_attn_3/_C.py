"""Where the published package has its extension: importing it registers the operators."""

import flash_attn_interface  # noqa: F401
