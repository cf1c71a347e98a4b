"""Modules that stand in for a package that is not installed; published folders carry a copy of this file and of theirs.

Lines of the modules stand behind a `|`, so that diffusers, which looks for imports line by line, takes them for text.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds and loads modules whose sources it has been given, by their names, each line behind a `|`."""

    def __init__(self, place: str, sources: dict[str, str]):
        self.place, self.sources = place, sources

    def find_spec(self, name: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if name not in self.sources:
            return None
        origin = self.file_name(name)
        spec = importlib.util.spec_from_loader(name, self, origin=origin, is_package=self.is_package(name))
        assert spec is not None  # a loader makes one
        spec.has_location = True  # gives modules a __file__; tracebacks and Triton read it through `get_source`
        return spec

    def file_name(self, name: str) -> str:
        return f"{self.place}/{name.replace('.', '/')}{'/__init__' if self.is_package(name) else ''}.py"

    def is_package(self, name: str) -> bool:
        return name.count(".") == 0 or any(other.startswith(f"{name}.") for other in self.sources)

    def get_source(self, name: str) -> str:
        return "".join(line[1:] for line in self.sources[name].splitlines(keepends=True) if line.startswith("|"))

    def get_code(self, name: str):
        return self.source_to_code(self.get_source(name), self.file_name(name))


def stand_in(package: str, place: str, sources: dict[str, str]) -> None:
    """Let `package` be imported from `sources`, unless it is installed or an earlier folder's stands in already."""
    if package in sys.modules:
        return
    spec = importlib.util.find_spec(package)
    # A module of the package's name is the file that this stands in, found in the working directory.
    if spec is None or spec.submodule_search_locations is None:
        sys.meta_path.insert(0, StandIn(place, sources))
