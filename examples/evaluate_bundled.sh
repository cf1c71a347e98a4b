#!/usr/bin/env bash
# Evaluate the bundled model on the clips that were held out of its training, and write the report page:
#
#     IMAGE_VAE=runs/image_vae/image_vae examples/evaluate_bundled.sh CLIPS_FOLDER OUT_FOLDER [--model LABEL=SOURCE ...]
#
# Beside the bundled model (BUNDLED names another folder, before it is packaged): its untrained state (keyframes broadcast,
# IMAGE_VAE inflated) and IMAGE_VAE frame by frame. Further models, e.g. earlier stages or tiny trained peers, are given as
# further arguments of `vcvae evaluate`. An interrupted run continues when it is started again. LPIPS and FVD need their
# weights once: `vcvae fetch-weights`.
set -euo pipefail

clips=${1:?folder of the clips}
out=${2:?folder for results and report}
shift 2
image_vae=${IMAGE_VAE:?folder of the image VAE that the bundled model was made of}
bundled=${BUNDLED:-vcvae-tiny}
here=$(cd "$(dirname "$0")" && pwd)

mkdir -p "$out"
awk '/^\[/ { held = ($0 == "[holdout]"); next } held && NF && !/^#/' "$here/configs/tiny_clips.txt" > "$out/holdout.txt"

models=(--model "VC-VAE (bundled)=$bundled" --model "untrained=inflate:$image_vae" --model "2-D frame by frame=$image_vae")
for size in 128 256; do
    vcvae evaluate "${models[@]}" "$@" --data "$clips" --samples "$out/holdout.txt" \
        --protocol folder --size "$size" --save-frames 3 --out "$out/holdout-$size.json"
done
# Every frame scored, the first one too: Table 6 and Fig. 4b in small.
vcvae evaluate "${models[@]}" "$@" --data "$clips" --samples "$out/holdout.txt" \
    --protocol first-frame --size 128 --out "$out/first-frame-128.json"
vcvae report "$out/holdout-128.json" "$out/holdout-256.json" "$out/first-frame-128.json" --out "$out/report"
