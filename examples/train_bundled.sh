#!/usr/bin/env bash
# Make the bundled checkpoint again, from clips to the folder that the package carries: image VAE, inflation, Stage I,
# Stage II, latent statistics. Hours on a CPU; every step goes on where it was stopped.
#
#   bash examples/train_bundled.sh CLIPS_FOLDER [RUNS_FOLDER]
set -euo pipefail
clips=${1:?usage: train_bundled.sh CLIPS_FOLDER [RUNS_FOLDER]}
runs=${2:-runs}
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

$python -m vc_vae_diffusers.cli fetch-weights lpips
$python examples/train_image_vae.py --data "$clips" --clips examples/configs/tiny_clips.txt --output "$runs/image_vae" --compile
$python examples/train_vcvae.py --config examples/configs/tiny_stage1.yaml --data "$clips" \
    --from_image_vae "$runs/image_vae/image_vae" --output "$runs/tiny_stage1"
$python examples/train_vcvae.py --config examples/configs/tiny_stage2.yaml --data "$clips" \
    --model "$runs/tiny_stage1/vae" --output "$runs/tiny_stage2"

IMAGE_VAE="$runs/image_vae/image_vae" PATH="$(dirname "$python"):$PATH" bash examples/evaluate_bundled.sh "$clips" "$runs/eval" \
    --model "Stage I=$runs/tiny_stage1/vae" --model "Stage II=$runs/tiny_stage2/vae"
$python examples/package_bundled.py --model "$runs/tiny_stage2/vae" --data "$clips" --results "$runs"/eval/holdout-*.json \
    --trained "image VAE, Stage I and Stage II by examples/train_bundled.sh" --out src/vc_vae_diffusers/models/vcvae-tiny
