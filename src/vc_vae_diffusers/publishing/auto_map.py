"""What lets published folders load without a prior import (the stubs are written by `hub.py`) and others read them."""

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ModelMixin
from torch import nn

from ..files import follow_umask
from ..names import some

# What the mixins are mixed into: at run time they have no base, so that any class of diffusers can be beside them.
_Model: Any = ModelMixin if TYPE_CHECKING else object


class AutoMapMixin(_Model):
    """Lets a class load configurations with `auto_map`, diffusers' entry for stubs, without a warning about it."""

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        known = {name: value for name, value in config_dict.items() if name != "auto_map"}
        return super().extract_init_dict(known, **kwargs)


class PublishedModelMixin(AutoMapMixin):
    """A model that is saved if it can be loaded again, with the permissions that the umask asks for."""

    @functools.wraps(ModelMixin.save_pretrained)  # pipelines look at the signature
    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any):
        check_saving(self)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            follow_umask(*Path(save_directory).glob("*.safetensors"))


def check_saving(model: Any) -> None:
    """Refuse to save a model from which nobody could load it again.

    Raises:
        ValueError: naming the weights.
    """
    quantised = getattr(model, "hf_quantizer", None) is not None  # by diffusers, which knows how to save them
    with torch.device("meta"):
        names = type(model).from_config(model.config).state_dict().keys()
    state, on_disk, plain = model.state_dict(keep_vars=True), _on_disk(model), (torch.Tensor, nn.Parameter)
    if (others := sorted(names ^ state.keys())) and not quantised:
        raise ValueError(
            f"the model has other layers than its configuration ({some(others)}) and could not be loaded: save it before "
            "they are put there, or with the library that did (for LoRA, call merge_and_unload first)"
        )
    away = [n for n, p in state.items() if p.is_meta or id(p) in on_disk or not (quantised or type(p) in plain)]
    if away:
        raise ValueError(
            f"{len(away)} weights are no tensors with values ({some(away)}): save the model before it is offloaded, "
            "sharded or quantised"
        )


def _on_disk(model: nn.Module) -> set[int]:
    """The parameters, by `id`, that diffusers' group offloading to disk leaves without values between calls."""
    hooks = [h for m in model.modules() for h in getattr(getattr(m, "_diffusers_hook", None), "hooks", {}).values()]
    groups = [hook.group for hook in hooks if getattr(getattr(hook, "group", None), "offload_to_disk_path", None)]
    held = [p for group in groups for p in (*group.parameters, *(p for m in group.modules for p in m.parameters()))]
    return {id(parameter) for parameter in held}


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
