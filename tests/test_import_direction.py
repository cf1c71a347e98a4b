"""One direction of imports: operators <- model <- what is around it <- evaluation <- commands; other parts stand alone.

A new module must be put into one of the tables below; `test_every_module_is_listed` says so.
"""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "vc_vae_diffusers"

# Modules that import these of ours and no others: the model's own parts, and parts that know nothing of the model.
EXACTLY = {
    "files": set(),
    "frame_conv": set(),
    "winograd": {"frame_conv"},
    "frame_winograd": {"frame_conv", "winograd"},
    "tdc": {"frame_conv", "winograd", "frame_winograd"},
    "tiling": set(),
    "frame_groups": set(),
    "auto_map": {"files"},
    "blocks": {"frame_conv", "tdc"},
    "image_vae": {"tdc"},
    "memory_plan": {"frame_conv", "tiling"},
    "autoencoder_kl_vcvae": {
        "frame_conv",
        "frame_groups",
        "tdc",
        "blocks",
        "tiling",
        "image_vae",
        "auto_map",
        "memory_plan",
    },
    "video_decoding": set(),
    "video_writing": {"video_decoding"},
    "video": {"video_decoding", "video_writing"},
    "weights": {"files"},
    "losses": {"weights"},
    "discriminator": set(),
    "diffusion_losses": set(),
    "data": {"video"},
    "latent_cache": {"data", "files"},
    "shards": {"data", "video"},
    "metrics": set(),
    "metrics.frame": set(),
    "metrics.fvd": {"metrics.i3d"},
    "metrics.i3d": {"weights"},
    "metrics.perceptual": {"metrics.frame", "weights"},
    "metrics.tokbench": set(),
    "metrics.tokbench_backends": {"weights"},
}

# Modules above the model, from the lowest to the highest: each may import its own layer, those before it, and the above.
LAYERS = (
    {"hub", "latte_transformer", "auto", "pipeline_latte"},
    {"training", "latent_stats", "distributed", "visualize"},
    {""},  # the package's __init__, which exports what users import
    {
        "evaluation",
        "evaluation.baselines",
        "evaluation.journal",
        "evaluation.loading",
        "evaluation.networks",
        "evaluation.protocols",
        "evaluation.results",
        "evaluation.runner",
        "evaluation.samples",
        "evaluation.scoring",
        "evaluation.tasks",
        "evaluation.tokbench_task",
    },
    {"report", "report.figures", "report.page", "report.paper", "report.tables"},
    {
        "commands",
        "commands.demo",
        "commands.info",
        "commands.latents",
        "commands.reconstruct",
        "commands.shared",
        "commands.tools",
        "evaluation.commands",
        "report.commands",
    },
    {"cli"},
)

# Import names of what only an extra installs: to be imported in the function that needs it.
OPTIONAL = {
    *("lpips", "torchvision", "yaml", "tensorboard", "webdataset", "scipy", "rapidfuzz", "matplotlib", "onnxruntime"),
    *("cv2", "skvideo", "rapidocr", "dlib", "skimage", "torchmetrics", "pytorch_msssim"),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if "models" not in path.parts}


def absolute(node: ast.ImportFrom, name: str, is_package: bool) -> str:
    """The full dotted name that `from … import` starts at."""
    if node.level == 0:
        return node.module or ""
    here = ["vc_vae_diffusers", *(name.split(".") if name else [])]
    base = here[: len(here) - node.level + is_package]
    return ".".join([*base, *([node.module] if node.module else [])])


def imports_of_ours(name: str, source: str, is_package: bool, modules: set[str]) -> set[str]:
    """The modules of the package that a module imports, anywhere in it, functions included."""
    targets = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets |= {(alias.name, None) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            targets |= {(absolute(node, name, is_package), alias.name) for alias in node.names}
    found = set()
    for module, attribute in targets:
        if module != "vc_vae_diffusers" and not module.startswith("vc_vae_diffusers."):
            continue
        inner = module.removeprefix("vc_vae_diffusers").removeprefix(".")
        submodule = f"{inner}.{attribute}".removeprefix(".")
        found.add(submodule if submodule in modules else inner)
    return found - {name}


IMPORTS = {
    name: imports_of_ours(name, path.read_text(), path.name == "__init__.py", set(FILES)) for name, path in FILES.items()
}


def test_the_parser_sees_every_form_of_import():
    modules = {"", "a", "a.b", "c"}
    source = """
import vc_vae_diffusers.c
from . import b
from .. import c
from ..c import thing
def later():
    from vc_vae_diffusers import exported
"""
    assert imports_of_ours("a", source, True, modules) == {"c", "a.b", ""}
    assert imports_of_ours("c", "from .a import x\nfrom .a.b import y\nimport torch", False, modules) == {"a", "a.b"}
    assert IMPORTS["autoencoder_kl_vcvae"] == EXACTLY["autoencoder_kl_vcvae"]


def test_every_module_is_listed():
    listed = set(EXACTLY).union(*LAYERS)
    unlisted = sorted(set(FILES) - listed)
    assert not unlisted, (
        f"{unlisted} are new: add each to tests/test_import_direction.py, to EXACTLY with the modules it may import if it "
        "is part of the model or knows nothing of it, or to one of LAYERS if it stands on the model"
    )
    gone = sorted(listed - set(FILES))
    assert not gone, f"{gone} no longer exist: remove them from tests/test_import_direction.py"
    assert sum(map(len, (EXACTLY, *LAYERS))) == len(listed), "a module is listed twice"


@pytest.mark.parametrize("name", sorted(EXACTLY))
def test_parts_import_nothing_else(name):
    too_much = IMPORTS.get(name, set()) - EXACTLY[name]
    assert not too_much, f"{name} imports {sorted(too_much)}; it may import {sorted(EXACTLY[name]) or 'nothing of ours'}"


@pytest.mark.parametrize("height", range(len(LAYERS)))
def test_layers_import_downwards(height):
    below = set(EXACTLY).union(*LAYERS[: height + 1])
    for name in sorted(LAYERS[height]):
        too_high = IMPORTS.get(name, set()) - below
        assert not too_high, f"{name or '__init__'} imports {sorted(too_high)} from above it"


def test_nothing_imports_the_command_line():
    assert [name for name, imports in IMPORTS.items() if "cli" in imports] == []


def test_no_cycles():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"import cycle: {' -> '.join((*path, name))}"
        if name in done:
            return
        for other in sorted(IMPORTS.get(name, set())):
            visit(other, (*path, name))
        done.add(name)

    for name in IMPORTS:
        visit(name, ())
    assert done >= set(IMPORTS)


def test_optional_dependencies_are_not_needed_to_import():
    required = set()
    for name, path in FILES.items():
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            required |= {(name, n) for n in names if n.split(".")[0] in OPTIONAL}
    assert not required, f"import these in the function that needs them: {sorted(required)}"


def test_only_pytorch_is_needed_for_the_operators():
    """The operators can be copied or used on their own (SPEC section 1)."""
    for name in ("frame_conv", "frame_winograd", "tdc", "winograd"):
        for node in ast.walk(ast.parse(FILES[name].read_text())):
            if isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                roots = {node.module.split(".")[0]}
            else:
                continue
            assert roots <= {"torch"} | set(sys.stdlib_module_names), f"{name} imports {roots}"
