"""A name that folders written by version 0.1 contain; see `generation/latte_transformer.py`."""

from .generation.latte_transformer import LatteAdaLNTransformer3DModel  # noqa: F401
