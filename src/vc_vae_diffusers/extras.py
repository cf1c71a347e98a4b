"""What to say when a package of an extra is missing. The package is on no index: extras are installed from a clone."""


def install_hint(extra: str) -> str:
    """The remedy for a missing package: how to install the extra that has it."""
    return f'pip install ".[{extra}]" in a clone of the repository'
