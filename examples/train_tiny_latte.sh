#!/usr/bin/env bash
# A small unconditional Latte on latents of the bundled VC-VAE, from clips to plot: cut the videos, encode them once, train,
# sample at several checkpoints, FVD of each against real clips, figures. An hour or so on one CPU core; every
# step goes on where it was stopped.
#
#   bash examples/train_tiny_latte.sh CLIPS_FOLDER [RUNS_FOLDER]
set -euo pipefail
clips=${1:?usage: train_tiny_latte.sh CLIPS_FOLDER [RUNS_FOLDER]}
out=${2:-runs}/latte_tiny
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
vae=${VAE:-src/vc_vae_diffusers/models/vcvae-tiny}
list=@examples/configs/latte_tiny_clips.txt
steps=(500 1000 2000 3000 4500)

# Two thirds of each video to train on, the last third only to measure with.
$python examples/cut_clips.py --data "$clips" --include $list --span 0 0.667 --output "$out/parts/train"
$python examples/cut_clips.py --data "$clips" --include $list --span 0.667 1 --output "$out/parts/heldout"
for part in train heldout; do
    $python examples/cut_clips.py --data "$out/parts/$part" --clips 64 --output "$out/real/$part"
done

$python examples/train_latte.py --config examples/configs/latte_tiny.yaml --data "$out/parts/train" --vae "$vae" \
    --latent_cache "$out/latents" --output "$out/run"

# The same noise at every checkpoint. Clips of the training part, as if they were samples, show how low FVD can get.
samples=(--model "training clips=samples:$out/real/train")
for step in "${steps[@]}"; do
    $python examples/sample_latte.py --model "$out/run/pipeline" --output "$out/samples/$step" --num 64 --steps 50 \
        --transformer "$out/run/checkpoints/step-$(printf %08d "$step")/ema" --batch_size 16 --fps 15 --device cpu
    samples+=(--model "$step=samples:$out/samples/$step")
done
$python -m vc_vae_diffusers.cli evaluate "${samples[@]}" --data "$out/real/heldout" --device cpu \
    --protocol examples/configs/latte_tiny_fvd.yaml --out "$out/fvd.json"
$python examples/plot_tiny_latte.py --run "$out" --output docs/images
