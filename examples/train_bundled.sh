#!/usr/bin/env bash
# Make the bundled checkpoint again, from clips to the folder that the package carries: image VAE, inflation, Stage I, results on
# the held-out clips, latent statistics, card. Ten minutes of one GPU, five of them training; then an hour of one CPU core.
#
#   bash examples/train_bundled.sh CLIPS_FOLDER [RUNS_FOLDER]
#
# On a GPU unlike the one it was made on (NVIDIA H200, the steps of tiny_training.md) give SCHEDULE=steps: as many steps then,
# in whatever time they take.
set -euo pipefail
clips=${1:?usage: train_bundled.sh CLIPS_FOLDER [RUNS_FOLDER]}
runs=${2:-runs/bundled}
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
image_budget=(--seconds 150) video_budget=(--seconds 151)
if [ "${SCHEDULE:-seconds}" = steps ]; then image_budget=(--steps 10790) video_budget=(--steps 5960); fi

$python -m vc_vae_diffusers.cli fetch-weights lpips
common=(--data "$clips" --lpips_weight 0.15 --mse_weight 4 --validate_every 50)
# What is done is passed over, what was interrupted goes on.
$python examples/train_bundled_gpu.py image "${common[@]}" --output "$runs/image_vae" \
    --channels 16 32 80 112 --norm_num_groups 4 --buckets "size=128 frames=1 fps=0 batch=32" --lpips_images 16 --learning_rate 2e-3 --frame_stride 2 \
    "${image_budget[@]}"
$python examples/train_bundled_gpu.py video "${common[@]}" --output "$runs/stage1" \
    --from_image_vae "$runs/image_vae/vae" --buckets "size=128 frames=8 fps=0 batch=8 weight=3" \
    "size=256 frames=8 fps=0 batch=2" --learning_rate 1.5e-3 --decay 0.5 "${video_budget[@]}"

IMAGE_VAE="$runs/image_vae/vae" BUNDLED="$runs/stage1/vae" PATH="$(dirname "$python"):$PATH" \
    bash examples/evaluate_bundled.sh "$clips" "$runs/eval"
$python examples/package_bundled.py --model "$runs/stage1/vae" --data "$clips" \
    --results "$runs"/eval/holdout-{128,256}.json \
    --logs "image VAE=$runs/image_vae/log.jsonl" "Stage I=$runs/stage1/log.jsonl" \
    --trained examples/configs/tiny_training.md --out src/vc_vae_diffusers/models/vcvae-tiny
