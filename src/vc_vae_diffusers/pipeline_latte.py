"""A name that folders written by version 0.1 contain; see `generation/pipeline_latte.py`."""

from .generation.pipeline_latte import LatteVCVAEPipeline, LatteVCVAEUnconditionalPipeline  # noqa: F401
