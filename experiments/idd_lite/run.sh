#!/bin/bash
# One run of IDD-Lite with all its tests, and its line for the tables: run.sh RECIPE SEED [OPTION ...]
#
#   DATA=PATH/data WEIGHTS=PATH/weights.safetensors experiments/idd_lite/run.sh gmmseg_fpn 0
#   SETS= ... run.sh softmax_mla 0
#   SETS= ... run.sh gss_ff 0 --model.tokenizer TOKENIZER
#   SETS= NAME=gss_free ... run.sh gss_ff 0 --model.tokenizer TOKENIZER --model.decoder.classes free
#   NAME=gmmseg_sum ... run.sh gmmseg_fpn 0 --model.mixture.density logsumexp
#   NAME=gmmseg_int5 ... run.sh gmmseg_fpn 0 --model.em.interval 5, NAME=gmmseg_mm9999 ... --model.em.mean_momentum 0.9999,
#   NAME=gmmseg_int5_sum and gmmseg_mm9999_sum ... with --model.mixture.density logsumexp as well
#   NAME=gmmseg_frozen_plain ... run.sh gmmseg_frozen 0 --model.mixture.shrinkage 0 --model.mixture.class_prior uniform
#   SETS= NAME=gss_majority ... run.sh gss_ff 0 --model.tokenizer majority-4
#
# DATA holds idd_lite/ and road_anomaly/{RoadAnomaly,FS_LostAndFound_val,FS_Static_val}/. NAME, by default the recipe,
# tells runs with other options apart: without one of its own such a run would be taken
# for the plain one, which is there already. SETS are the sets of anomalies that are tested, all of them by default.
# TOKENIZER is the last.ckpt of maskige_vq.yaml. What is there already is not done again.
set -euo pipefail
recipe=$1 seed=$2; shift 2
name=${NAME:-$recipe}
runs=${RUNS:-runs}/idd_lite; run=$runs/$name/seed$seed
short_side='{short_side: 256, scales: [1.0]}'

. experiments/fit.sh
fit "$runs" "$name" "seed$seed" --config "experiments/idd_lite/$recipe.yaml" --data.root "$DATA/idd_lite" \
    --model.encoder_weights "$WEIGHTS" --seed_everything "$seed" "$@"
calibrated=$run/checkpoints/last-calibrated.ckpt
[ -z "${SETS-all}" ] || [ -e "$calibrated" ] || genseg calibrate --config "$run/config.yaml" --model.inference "$short_side" \
    --ckpt_path "$run/checkpoints/last.ckpt"
tests=()
for set in ${SETS-FS_Static_val FS_LostAndFound_val RoadAnomaly}; do
    tests+=("$set=$run/$set")
    [ -e "$run/$set/anomaly_scores.json" ] || genseg test --config "$run/config.yaml" \
        --config experiments/anomaly/idd_lite.yaml --data.root "$DATA/road_anomaly/$set" --ckpt_path "$calibrated" \
        --trainer.callbacks+ CompareScores --trainer.logger.init_args.version "seed$seed/$set"
done
python experiments/make_results.py add "idd_lite/$name" "$run" ${tests[@]+"${tests[@]}"}
