#!/usr/bin/env bash
# Table 4 in small: TDC against plain convolutions, in groups and causal, from one image VAE, the same clips and seeds and
# a few hundred steps each; about five minutes each on one CPU core. A run that was stopped goes on when it is started again.
#
#   IMAGE_VAE=runs/image_vae/image_vae bash examples/train_ablation.sh CLIPS_FOLDER [RUNS_FOLDER] [VARIANT ...]
#
# Variants: group_tdc (the full model), group_conv, causal_tdc, causal_conv; all four if none is named.
set -euo pipefail
clips=${1:?usage: train_ablation.sh CLIPS_FOLDER [RUNS_FOLDER] [VARIANT ...]}
image_vae=${IMAGE_VAE:?folder of the image VAE}
runs=${2:-runs}
variants=("${@:3}")
[ ${#variants[@]} -gt 0 ] || variants=(group_tdc group_conv causal_tdc causal_conv)
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

for variant in "${variants[@]}"; do
    $python examples/train_vcvae.py --config examples/configs/ablation_tiny.yaml --data "$clips" \
        --from_image_vae "$image_vae" --output "$runs/ablation_$variant" \
        --model_options "{\"temporal_causality\": \"${variant%_*}\", \"temporal_operator\": \"${variant#*_}\"}"
done
