#!/bin/bash
# A trial of where GMMSeg's means begin, on IDD-Lite at half size, and its line for the tables: starts.sh START SEED
#
#   DATA=PATH/data WEIGHTS=PATH/weights.safetensors experiments/idd_lite/starts.sh random 0
#
# START is random, orthogonal, kmeans, kmeans_apart or handover (300 steps of softmax, then 500 of GMMSeg with its network);
# to compare with, decay (random, and that memory of EM) and softmax.
# DATA and WEIGHTS: see run.sh. Each takes some three minutes of a core.
set -euo pipefail
start=$1 seed=$2
runs=${RUNS:-runs}/idd_lite_half; run=$runs/$start/seed$seed
export PYTHONPATH=experiments/idd_lite${PYTHONPATH:+:$PYTHONPATH}
[ -e "$runs/frames/val.txt" ] || python experiments/idd_lite/starts.py "$DATA/idd_lite" "$runs/frames"
. experiments/fit.sh
train() { # RECIPE NAME STEPS OPTION ...
    local recipe=$1 name=$2 steps=$3; shift 3
    fit "$runs" "$name" "seed$seed" --config "experiments/idd_lite/$recipe.yaml" --config experiments/idd_lite/half.yaml \
        --data.root "$runs/frames" --model.encoder_weights "$WEIGHTS" --seed_everything "$seed" \
        --trainer.max_steps "$steps" --trainer.val_check_interval "$steps" --model.lr_scheduler.init_args.total_iters "$steps" "$@"
}
case $start in
    random | orthogonal) train gmmseg_fpn "$start" 800 --model.mixture.start "$start" ;;
    kmeans) train gmmseg_fpn "$start" 800 --trainer.callbacks+ starts.KMeansStart ;;
    kmeans_apart) train gmmseg_fpn "$start" 800 --trainer.callbacks+ starts.KMeansStart --trainer.callbacks.apart true ;;
    handover)
        train softmax_fpn softmax_short 300
        train gmmseg_fpn "$start" 500 --model.extractor "$runs/softmax_short/seed$seed/checkpoints/last.ckpt" ;;
    decay) train gmmseg_fpn "$start" 800 --model.em.memory decay ;;
    softmax) train softmax_fpn "$start" 800 ;;
    *) echo "starts.sh: no start '$start'" >&2; exit 2 ;;
esac
tests=()
for set in FS_Static_val FS_LostAndFound_val RoadAnomaly; do
    tests+=("$set=$run/$set")
    genseg test --config "$run/config.yaml" --config experiments/anomaly/idd_lite.yaml --model.inference '{short_side: 128, scales: [1.0]}' \
        --data.root "$DATA/road_anomaly/$set" --ckpt_path "$run/checkpoints/last.ckpt" --trainer.callbacks+ CompareScores \
        --trainer.logger.init_args.version "seed$seed/$set"
done
python experiments/make_results.py add "idd_lite_half/$start" "$run" "${tests[@]}"
