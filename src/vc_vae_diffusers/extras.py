"""Packages of extras. This package is on no index: its extras are installed from a clone."""

from __future__ import annotations

from types import ModuleType
from typing import Any


def install_hint(extra: str) -> str:
    """The remedy for a missing package: how to install the extra that has it."""
    return f'pip install ".[{extra}]" in a clone of the repository'


def load_yaml(extra: str) -> ModuleType:
    """The yaml package.

    Args:
        extra: that installs it.

    Raises:
        ImportError: if it is missing.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"YAML files need PyYAML: {install_hint(extra)}") from error
    return yaml


def parse_yaml(text: str, name: str, extra: str) -> Any:
    """What a YAML file holds.

    Args:
        text: of the file.
        name: of the file, for errors.
        extra: that installs PyYAML.

    Raises:
        ValueError: if it is no YAML.
        ImportError: if PyYAML is missing.
    """
    yaml = load_yaml(extra)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is no YAML: {' '.join(str(error).split())}; correct it") from error
