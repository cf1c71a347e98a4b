#!/usr/bin/env bash
# Train tiny peers of the bundled model from random weights: Wan's and HunyuanVideo's VAE in small (16 latent channels,
# 4x8x8, five million parameters), by the same command as VC-VAE. About half an hour each on one CPU core; a run that was
# stopped goes on when it is started again. This shows that the tools take any diffusers video VAE. It ranks nothing: a
# thousand steps make no VAE.
#
#   bash examples/train_peers.sh CLIPS_FOLDER [RUNS_FOLDER]
set -euo pipefail
clips=${1:?usage: train_peers.sh CLIPS_FOLDER [RUNS_FOLDER]}
runs=${2:-runs}
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

$python -m vc_vae_diffusers.cli fetch-weights lpips
$python - "$runs" <<'PYTHON'
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan

peers = {
    "wan": lambda: AutoencoderKLWan(base_dim=24, z_dim=16, dim_mult=[1, 2, 3, 4], num_res_blocks=1),
    "hunyuan": lambda: AutoencoderKLHunyuanVideo(
        block_out_channels=(32, 48, 64, 96), layers_per_block=1, norm_num_groups=16, latent_channels=16
    ),
}
for name, build in peers.items():
    torch.manual_seed(0)
    build().save_pretrained(Path(sys.argv[1]) / "peer_init" / name)
PYTHON
for name in wan hunyuan; do
    $python examples/train_vcvae.py --config examples/configs/peer_tiny.yaml --data "$clips" \
        --model "$runs/peer_init/$name" --output "$runs/peer_$name"
done
