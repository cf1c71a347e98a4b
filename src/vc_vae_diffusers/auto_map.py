"""What lets published folders load without a prior import; the stubs themselves are written by `hub.py`."""

from typing import Any


class AutoMapMixin:
    """Lets a class load configurations with `auto_map`, diffusers' entry for stubs, without a warning about it."""

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        known = {name: value for name, value in config_dict.items() if name != "auto_map"}
        return super().extract_init_dict(known, **kwargs)
