"""Configuration and weights of `AutoencoderKLVCVAE`, kept in agreement: saving, loading, changing. Not in the paper."""

import functools
import inspect
import logging
from pathlib import Path
from typing import Any

import diffusers
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin

from ..operators.conversion import apply_tdc, remove_tdc
from ..operators.tdc import TemporalConv3d
from ..publishing.auto_map import PublishedModelMixin
from .checks import check_config, check_weights, unknown_arguments

logger = logging.getLogger(__name__)

# What may change in a model that is built; the rest is its architecture, or follows from it.
_SETTINGS = {
    *("scaling_factor", "shift_factor", "latents_mean", "latents_std"),
    *("first_frame", "frame_convention", "invert_scale_latents"),
}
# Told to `extract_init_dict` by `from_pretrained`: the configuration is that of weights.
_OF_WEIGHTS = "_of_weights"


class SavedModelMixin(PublishedModelMixin, ModelMixin, ConfigMixin):
    """A model whose configuration says what its weights are, and that is not loaded otherwise."""

    def register_to_config(self, **changes: Any) -> None:
        """As in diffusers. Of a model that is built only settings can change, and what follows from them does as well.

        Raises:
            ValueError: for a value that `__init__` would refuse, or an argument that only it can take.
        """
        if "encoder" in self.__dict__.get("_modules", {}):
            fixed = {**self.config, "temporal_operator": self._operator()}  # `apply_tdc` and `remove_tdc` change the layers
            for name in set(changes) & set(inspect.signature(type(self).__init__).parameters) - _SETTINGS:
                if not _same(changes[name], fixed[name]):
                    raise ValueError(
                        f"{name} is {fixed[name]!r} and cannot become {changes[name]!r} in a built model: make another one "
                        "with from_config"
                    )
            config = {**_without_stale_statistics(self.config, changes), **changes}
            check_config(config)
            changes = {**changes, **default_statistics(config)}
        super().register_to_config(**changes)

    def _operator(self) -> str:
        """The temporal operator that the layers are of, whatever the configuration says."""
        operators = {"tdc" if m.differences else "conv" for m in self.modules() if isinstance(m, TemporalConv3d)}
        if len(operators) > 1:
            raise ValueError("layers are of both temporal operators: call apply_tdc or remove_tdc on the whole model")
        return operators.pop() if operators else self.config.temporal_operator

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """Read a saved configuration; a `scaling_factor` or `shift_factor` given beside it replaces the saved statistics.

        Pipelines prefer `latents_std` and `latents_mean`, and would not see the factor that the caller asked for.

        Raises:
            ValueError: for the configuration of another model.
        """
        saved_class = config_dict.get("_class_name", cls.__name__)
        if saved_class != cls.__name__ and hasattr(diffusers, str(saved_class)):
            remedy = ", call from_image_vae to make a video VAE of it" if saved_class == "AutoencoderKL" else ""
            raise ValueError(f"the configuration is of {saved_class}, not of {cls.__name__}{remedy}: check the path")
        if kwargs.pop(_OF_WEIGHTS, False):
            _check_overrides(config_dict, kwargs, cls)
        return super().extract_init_dict(_without_stale_statistics(config_dict, kwargs), **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """As in diffusers, in eval mode, with these differences.

        Only safetensors are read, unless `use_safetensors=False` asks for pickled weights. Missing weights and weights that
        are not finite are errors. Settings replace the saved ones; `temporal_operator` converts the weights, so that the
        model computes what it computed. Unknown arguments are warned of.

        Raises:
            ValueError: for the folder of another model, an architecture that the weights do not have, or damaged weights.
            OSError: if there is nothing to read.
        """
        source = pretrained_model_name_or_path
        operator = kwargs.pop("temporal_operator", None)
        with_info = kwargs.pop("output_loading_info", False)
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        vae, info = super().from_pretrained(source, output_loading_info=True, **{_OF_WEIGHTS: True}, **kwargs)
        check_weights(vae, info, source)
        if operator not in (None, vae.config.temporal_operator):
            if kwargs.get("device_map") is not None:
                raise ValueError(
                    f"temporal_operator is {operator!r}, the weights are of {vae.config.temporal_operator!r}, and "
                    "device_map has put them in their places: convert first (load without device_map, save_pretrained)"
                )
            check_config({**vae.config, "temporal_operator": operator})
            (apply_tdc if operator == "tdc" else remove_tdc)(vae)
        return (vae, info) if with_info else vae

    @functools.wraps(PublishedModelMixin.save_pretrained)
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        self.register_to_config(temporal_operator=self._operator())
        super().save_pretrained(*args, **kwargs)


def default_statistics(config: dict[str, Any]) -> dict[str, list[float]]:
    """Mean and standard deviation by channel; where they are not given, the shift and one over the scale."""
    channels, mean, std = config["latent_channels"], config["latents_mean"], config["latents_std"]
    return {
        "latents_mean": [config["shift_factor"] or 0.0] * channels if mean is None else list(mean),
        "latents_std": [1 / config["scaling_factor"]] * channels if std is None else list(std),
    }


def _without_stale_statistics(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the statistics that a `scaling_factor` or `shift_factor` given beside it replaces."""
    config = dict(config)
    for factor, statistic in (("scaling_factor", "latents_std"), ("shift_factor", "latents_mean")):
        if factor in changes and statistic not in changes:
            measured, config[statistic] = config.get(statistic), None
            if isinstance(measured, (list, tuple)) and len(set(measured)) > 1:
                logger.warning(
                    f"{factor}={changes[factor]} replaces the {statistic} by channel that this configuration has; pass "
                    f"{statistic} as well to keep them"
                )
    return config


def _same(value: Any, other: Any) -> bool:
    return list(value) == list(other) if isinstance(value, (list, tuple)) and other is not None else value == other


def _check_overrides(saved: dict[str, Any], given: dict[str, Any], cls: type[SavedModelMixin]) -> None:
    """Say what arguments of `from_pretrained` do to weights that were trained with a saved configuration."""
    parameters = inspect.signature(cls.__init__).parameters
    if unknown := unknown_arguments(given, parameters):
        logger.warning(f"from_pretrained does not know {unknown}: check the spelling, it is ignored")
    for name in set(given) & set(parameters):
        before = saved.get(name, parameters[name].default)
        if name == "temporal_causality" and not _same(given[name], before):
            raise ValueError(
                f"{name} is {given[name]!r}, the weights were trained as {before!r}, whose slices mean other frames: leave "
                "it out, or start anew with from_image_vae"
            )
        if name in ("temporal_padding", "first_frame") and not _same(given[name], before):
            logger.warning(f"{name}={given[name]!r}, but the weights were trained with {before!r}: results are not theirs")
