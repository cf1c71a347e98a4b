"""One loader for every model class of the package, which the stubs beside published weights use (`hub.py`)."""

from typing import Any

from diffusers import ModelMixin

from ..autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE
from ..generation.latte_transformer import LatteAdaLNTransformer3DModel

MODELS: dict[str, type[ModelMixin]] = {model.__name__: model for model in (AutoencoderKLVCVAE, LatteAdaLNTransformer3DModel)}


class AutoVCVAEModel:
    """What diffusers' `AutoModel` calls for a component of a pipeline folder: the class follows from its config.json.

    A pipeline's index can name one class for all of its components, so that class has to look.
    """

    @classmethod
    def from_pretrained(cls, path: str, subfolder: str | None = None, **kwargs: Any) -> ModelMixin:
        """Load a component with the class that its configuration names; arguments as in `ModelMixin.from_pretrained`.

        Raises:
            ValueError: when that class is not of this package.
        """
        hub = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
        options = {name: kwargs[name] for name in hub if name in kwargs}
        name = AutoencoderKLVCVAE.load_config(path, subfolder=subfolder, **options)["_class_name"]
        if name not in MODELS:
            raise ValueError(
                f"{path} has a {name} in {subfolder!r}, which is no model of vc_vae_diffusers ({sorted(MODELS)}): load it"
                " with its own class."
            )
        return MODELS[name].from_pretrained(path, subfolder=subfolder, **kwargs)
