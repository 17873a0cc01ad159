#!/bin/bash
# One run of CamVid, its tests, and its line for the tables: run.sh RECIPE SEED [OPTION ...]
#
#   DATA=PATH/data WEIGHTS=PATH/weights.safetensors experiments/camvid/run.sh gmmseg_fpn 0
#   SIZE=half SETS= ... run.sh softmax_mla 0
#   SIZE=half SETS= ... run.sh gss_ff 0 --model.tokenizer TOKENIZER --model.decoder.classes shared
#
# SIZE is full or half: what full.yaml or half.yaml says goes beside the recipe.
# DATA holds camvid/ and camvid_ood_composite/. NAME, by default the recipe, tells runs with other options apart; with SETS=
# the composite's anomalies are not tested. TOKENIZER is the last.ckpt of maskige_vq.yaml.
# What is there already is not done again.
set -euo pipefail
recipe=$1 seed=$2; shift 2
name=${NAME:-$recipe}
size=${SIZE:-full}
runs=${RUNS:-runs}/camvid_$size; run=$runs/$name/seed$seed
. experiments/fit.sh
fit "$runs" "$name" "seed$seed" --config "experiments/camvid/$recipe.yaml" --config "experiments/camvid/$size.yaml" \
    --data.root "$DATA/camvid" --model.encoder_weights "$WEIGHTS" --seed_everything "$seed" "$@"
tests=("test=$run/test")
[ -e "$run/test/metrics.json" ] || genseg test --config "$run/config.yaml" --ckpt_path "$run/checkpoints/last.ckpt" \
    --trainer.logger.init_args.version "seed$seed/test"
if [ -n "${SETS-composite}" ]; then
    tests+=("composite=$run/composite")
    calibrated=$run/checkpoints/last-calibrated.ckpt
    [ -e "$calibrated" ] || genseg calibrate --config "$run/config.yaml" --ckpt_path "$run/checkpoints/last.ckpt"
    [ -e "$run/composite/anomaly_scores.json" ] || genseg test --config "$run/config.yaml" \
        --config experiments/anomaly/camvid_composite.yaml --data.root "$DATA/camvid_ood_composite" \
        --ckpt_path "$calibrated" --trainer.callbacks+ CompareScores --trainer.logger.init_args.version "seed$seed/composite"
fi
python experiments/make_results.py add "camvid_$size/$name" "$run" "${tests[@]}"
