#!/usr/bin/env bash
# Measure the bundled model and its rivals on the clips held out of its training, and write the report page of docs/report:
#
#     bash examples/proof_report.sh CLIPS_FOLDER OUT_FOLDER [LABEL=SOURCE ...]
#
# Beside the bundled model: the models that are named, e.g. the peers of train_peers.sh, and with IMAGE_VAE=FOLDER, the image
# VAE that the bundled model was made of, that one frame by frame and inflated without a step of video. A run that was stopped goes on when it is started again, and a later run adds the
# models that are not there yet. LPIPS and FVD need their weights once: `vcvae fetch-weights`.
#
# SKIP_256=1 leaves out the table at 256 pixels.
# ABLATION="LABEL=SOURCE LABEL=SOURCE …" adds a table of those models alone (train_ablation.sh); labels without spaces.
set -euo pipefail
clips=${1:?usage: proof_report.sh CLIPS_FOLDER OUT_FOLDER [LABEL=SOURCE ...]}
out=${2:?usage: proof_report.sh CLIPS_FOLDER OUT_FOLDER [LABEL=SOURCE ...]}
here=$(cd "$(dirname "$0")" && pwd)

[ -f "$out/first_windows.txt" ] || python "$here/proof_clips.py" --data "$clips" --clips "$here/configs/tiny_clips.txt" --output "$out"

models=()
[ -z "${IMAGE_VAE:-}" ] || models=(--model "untrained=inflate:$IMAGE_VAE" --model "2-D frame by frame=$IMAGE_VAE")
for model in "${@:3}"; do models+=(--model "$model"); done
models+=(--model "VC-VAE (bundled)=vcvae-tiny")
first=(--samples "$out/first_windows.txt")
cheap=psnr,ssim,lpips_vgg,flicker,temporal_difference_psnr
results=()
measure() { # NAME, then options of vcvae evaluate
    vcvae evaluate "${@:2}" --out "$out/$1.json"
    results+=("$out/$1.json")
}

measure heldout-128 "${models[@]}" --data "$out/windows" --protocol folder --size 128
[ -n "${SKIP_256:-}" ] || measure heldout-256 "${models[@]}" --data "$out/windows" "${first[@]}" --protocol folder --size 256 --metrics psnr,ssim,flicker
# Every frame scored, the first one too: Table 6 and Fig. 4b in small.
measure first-frame-128 "${models[@]}" --data "$out/windows" "${first[@]}" --protocol first-frame --size 128 --metrics psnr,ssim
if [ -n "${ABLATION:-}" ]; then
    ablation=()
    for model in $ABLATION; do ablation+=(--model "$model"); done
    measure ablation-128 "${ablation[@]}" --data "$out/windows" --protocol folder --size 128 --metrics "$cheap"
fi
measure photographs-128 "${models[@]}" --data "$out/shown" --protocol folder --size 128 --metrics "$cheap" --save-frames 1

vcvae report "${results[@]}" --out "$out/report" --strip-frames 3 --title "VC-VAE in small: a proof of the tools" \
    --note "Tiny models, trained for minutes on 52 short clips: this shows that the tools work, and ranks no method." \
    --note "Held out: 7 clips, $(find "$out/windows" -name '*.mkv' | wc -l) windows of 16 scored frames. FVD of so few windows is \
biased upwards and of high variance: read it within one table at most." \
    --note "The held-out clips may not be shown here. The pictures are of a camera move over a photograph without copyright \
(an astronaut, by NASA); the last table is of this one and of one over a coffee cup (CC0, courtesy of Pikolo Espresso Bar). \
examples/proof_clips.py makes both."
