"""What a stranger's machine gets: sdist and wheel built, installed without extras in a fresh environment, used elsewhere.

`make package` runs it, and continuous integration with it; no test of pytest, since it installs PyTorch from the index.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = ("reconstruct", "encode", "decode", "evaluate", "report", "stats", "plan", "visualize", "info", "demo")
LARGEST_WHEEL = 20 * 10**6

# What needs an extra, and the extra it must name. `{clips}` and `{here}` are filled in.
NEEDS = (
    ("evaluate --model original --data {clips} --out {here}/lpips.json --metrics lpips_vgg", "train"),
    ("report {here}/psnr.json", "eval"),
    ("train vcvae --model {here}/model --data {clips} --output {here}/run", "train"),
)


def run(*words: object, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != code:
        told = f"{' '.join(map(str, words))}: exit status {done.returncode}, not {code}"
        raise SystemExit(f"{told}\n{done.stdout}\n{done.stderr}")
    return done


def build(folder: Path) -> tuple[Path, Path]:
    """The source distribution, and the wheel built from it."""
    run(sys.executable, "-m", "build", "--outdir", folder, cwd=ROOT)
    (source,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    with tarfile.open(source) as archive:
        there = {name.partition("/")[2] for name in archive.getnames()}
    tracked = set(run("git", "ls-files", cwd=ROOT).stdout.splitlines()) if (ROOT / ".git").exists() else set()
    left_out = {name for name in tracked - there if not name.startswith(".") and (ROOT / name).exists()}
    assert not left_out, f"not in the source distribution: {sorted(left_out)}"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert wheel.stat().st_size <= LARGEST_WHEEL, f"{wheel.name} has {wheel.stat().st_size:,} bytes"
    strange = [name for name in names if not name.startswith("vc_vae_diffusers")]
    assert not strange, f"in the wheel, and none of the package: {strange}"
    for name in ("py.typed", "models/vcvae-tiny/diffusion_pytorch_model.safetensors", "evaluation/protocols/webvid.yaml"):
        assert f"vc_vae_diffusers/{name}" in names, f"{name} is not in the wheel"
    return source, wheel


def use(wheel: Path, folder: Path) -> None:
    """Install the wheel and nothing else, and do the main jobs from another folder."""
    environment, elsewhere = folder / "environment", folder / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "venv", environment, cwd=folder)
    run(environment / "bin/pip", "install", "--quiet", wheel, cwd=folder)
    run(environment / "bin/pip", "check", cwd=folder)
    vcvae = environment / "bin/vcvae"
    run(vcvae, "--version", cwd=elsewhere)
    for command in (*COMMANDS, "fetch-weights"):
        run(vcvae, command, "--help", cwd=elsewhere)
    for trainer in ("vcvae", "image-vae", "latte"):
        run(vcvae, "train", trainer, "--help", cwd=elsewhere)

    said = run(vcvae, "demo", "--out", "out", cwd=elsewhere)
    assert "test pattern" in said.stdout, said  # the real clip comes with an extra, and the demo says so
    pattern = elsewhere / "out/test_pattern.mp4"
    said = run(vcvae, "reconstruct", pattern, "again.mp4", "--num-frames", 8, "--json", cwd=elsewhere)
    assert json.loads(said.stdout)["frames"] == 8, said
    run(vcvae, "encode", pattern, "it.safetensors", "--num-frames", 8, cwd=elsewhere)
    run(vcvae, "decode", "it.safetensors", "decoded.mp4", cwd=elsewhere)
    run(
        vcvae,
        *["evaluate", "--model", "original", "--data", "out", "--out", "psnr.json", "--metrics", "psnr"],
        cwd=elsewhere,
    )
    for words, extra in NEEDS:
        said = run(vcvae, *words.format(clips=elsewhere / "out", here=elsewhere).split(), cwd=elsewhere, code=1)
        assert f'pip install ".[{extra}]"' in said.stderr, said


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        source, wheel = build(Path(name))
        use(wheel, Path(name))
        print(f"{source.name} {source.stat().st_size:,} bytes, {wheel.name} {wheel.stat().st_size:,} bytes: both work")


if __name__ == "__main__":
    main()
