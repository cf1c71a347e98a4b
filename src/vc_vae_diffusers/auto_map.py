"""What lets published folders load without a prior import (the stubs are written by `hub.py`) and others read them."""

import functools
import os
from pathlib import Path
from typing import Any

from diffusers import ModelMixin

from .files import follow_umask


class AutoMapMixin:
    """Lets a class load configurations with `auto_map`, diffusers' entry for stubs, without a warning about it."""

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        known = {name: value for name, value in config_dict.items() if name != "auto_map"}
        return super().extract_init_dict(known, **kwargs)


class PublishedModelMixin(AutoMapMixin):
    """A model whose saved weights have the permissions that the umask asks for, as its configuration has."""

    @functools.wraps(ModelMixin.save_pretrained)  # pipelines look at the signature
    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any):
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            follow_umask(*Path(save_directory).glob("*.safetensors"))
