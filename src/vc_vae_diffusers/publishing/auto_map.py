"""What lets published folders load without a prior import (the stubs are written by `hub.py`) and others read them."""

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import ModelMixin

from ..files import follow_umask

# What the mixins are mixed into: at run time they have no base, so that any class of diffusers can be beside them.
_Model: Any = ModelMixin if TYPE_CHECKING else object


class AutoMapMixin(_Model):
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


class HubPipelineMixin(AutoMapMixin):
    """`save_pretrained` that can write the stubs."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *args: Any,
        remote_code: bool = False,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save as diffusers does, with its arguments; `remote_code=True` adds the stubs of `add_remote_code`.

        Raises:
            ValueError: for `push_to_hub=True`. What diffusers uploads has no stubs, without which nobody can load it.
        """
        if push_to_hub:
            raise ValueError(
                "push_to_hub is True, but what diffusers uploads has neither the stubs that this pipeline needs on the hub "
                "nor a filled card; use vc_vae_diffusers.publishing.hub.push_to_hub(pipeline, repo_id, content)"
            )
        super().save_pretrained(save_directory, *args, **kwargs)
        if remote_code:
            from .hub import add_remote_code  # which published folders do not carry

            add_remote_code(save_directory)
