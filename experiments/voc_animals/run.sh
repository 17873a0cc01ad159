#!/bin/bash
# One run on the animals of VOC 2012, and its line for the tables: run.sh RECIPE SEED [OPTION ...]
#
#   DATA=PATH/data WEIGHTS=PATH/weights.safetensors experiments/voc_animals/run.sh agmm_fpn 0
#   NAME=agmm_paper ... run.sh agmm_fpn 0 --model.preset paper
#   NAME=agmm_paper_1600 ... the same, --trainer.max_steps 1600 and --model.lr_scheduler.init_args.total_iters 1600;
#   NAME=softmax_1600 ... run.sh softmax_fpn 0 with the last two options
#   NAME=agmm_self0 ... run.sh agmm_fpn 0 --model.self_weight 0, likewise agmm_gauss0, agmm_contrast0, agmm_image0
#   NAME=agmm_deeplab ... run.sh agmm_fpn 0 --model.decoder deeplabv3plus_full \
#       --model.network_options '{decoder_channels: 64, encoder_output_stride: 16}'
#   NAME=softmax_deeplab ... run.sh softmax_fpn 0 with the same two options
#   NAME=softmax_masks ... run.sh softmax_fpn 0 --data.sparse null
#   NAME=gmmseg_masks ... run.sh gmmseg_fpn 0 --data.sparse null --model.em.label_reduction nearest
#   NAME=gmmseg_nohorse ... the same, and --data.unknown_classes '[horse]'
#   NAME=gmmseg_masks_sum ... the same, and --model.mixture.density logsumexp, likewise gmmseg_masks_d256
#       (mixture.embedding_dim 256), _m1 (mixture.components 1), _vf02 (mixture.variance_floor 0.02), _mm99 and _mm1
#       (em.mean_momentum), _int5 (em.interval 5), _grad (em.train gradient)
#   run.sh gmmseg_frozen 0
#   NAME=gmmseg_frozen_plain ... run.sh gmmseg_frozen 0 --model.mixture.shrinkage 0 --model.mixture.class_prior uniform
#   NAME=gmmseg_frozen_prior ... the first of them alone, NAME=gmmseg_frozen_shrunk ... the second
#   NAME=gmmseg_frozen_clicks ... run.sh gmmseg_frozen 0 --model.em.label_reduction labelled \
#       --data.sparse '{class_path: PointFiles, init_args: {files: points.json}}'
#   NAME=gmmseg_frozen_nohorse ... run.sh gmmseg_frozen 0 --data.unknown_classes '[horse]'
#   run.sh gss_ff 0 --model.tokenizer TOKENIZER
#
# DATA holds voc2012_animals/. NAME, by default the recipe, tells runs with other options apart: without one of its own
# such a run would be taken for the plain one, which is there already. Trained on both of its
# training lists, VOC's and SBD's masks; the test on the validation images is for the calibration of the probabilities.
# What is there already is not done again. TOKENIZER is the last.ckpt of maskige_vq.yaml.
set -euo pipefail
recipe=$1 seed=$2; shift 2
name=${NAME:-$recipe}
runs=${RUNS:-runs}/voc_animals; run=$runs/$name/seed$seed
mkdir -p "$run"
cat "$DATA"/voc2012_animals/lists/train{,_sbd_extra}.txt > "$run/train.txt"
. experiments/fit.sh
fit "$runs" "$name" "seed$seed" --config "experiments/voc_animals/$recipe.yaml" --data.root "$DATA/voc2012_animals" \
    --data.train_list "$run/train.txt" --model.encoder_weights "$WEIGHTS" --seed_everything "$seed" "$@"
# Without a list of its own the test is on the validation images.
[ -e "$run/test/metrics.json" ] || genseg test --config "$run/config.yaml" --ckpt_path "$run/checkpoints/last.ckpt" \
    --trainer.logger.init_args.version "seed$seed/test"
python experiments/make_results.py add "voc_animals/$name" "$run" "val=$run/test"
