#!/bin/bash
# Few-shot segmentation of one fold, all methods, and their lines for the tables: fewshot.sh SET FOLD SEED
#
#   DATA=PATH/data WEIGHTS=PATH/weights.safetensors experiments/fewshot.sh voc_animals 0 0
#
# SET is voc_animals (folds 0 to 4, one animal each) or msrc (0 to 3), in DATA/voc2012_animals or DATA/msrc_v2; WEIGHTS are
# EfficientNet-Lite2's. The base learner, then BAM and CGMGM on it, then the tests of both and of prototypes with one and five
# examples. VOC's animals: trained on both training lists, VOC's and SBD's masks; of the validation list every fifth image is for
# validation, the others are for the test. What is there already is not done again.
set -euo pipefail
dataset=$1 fold=$2 seed=$3
runs=${RUNS:-runs}/$dataset name=fold$fold/seed$seed
case $dataset in
voc_animals)
    lists=$runs/episodes
    mkdir -p "$lists"
    cat "$DATA"/voc2012_animals/lists/train{,_sbd_extra}.txt > "$lists/train.txt"
    awk -v lists="$lists" '{print > (lists (NR % 5 ? "/test.txt" : "/val.txt"))}' "$DATA/voc2012_animals/lists/val.txt"
    data=(--data.data.root "$DATA/voc2012_animals" --data.fold "$fold")
    for split in train val test; do data+=("--data.data.${split}_list" "$(realpath "$lists/$split.txt")"); done
    ;;
msrc)
    data=(--data.data.root "$DATA/msrc_v2" --data.folds "$DATA/msrc_v2/fewshot_folds.json" --data.fold "$fold")
    ;;
*)
    echo "fewshot.sh: '$dataset' is not known: give voc_animals or msrc" >&2
    exit 2
    ;;
esac
. experiments/fit.sh
train() { # METHOD OPTION ...
    local method=$1; shift
    fit "$runs" "$method" "$name" --config "experiments/$dataset/$method.yaml" "${data[@]}" --seed_everything "$seed" "$@"
}
train base_learner --model.encoder_weights "$WEIGHTS"
base=$runs/base_learner/$name
train bam --model.base_learner "$base/checkpoints/last.ckpt"
train cgmgm --model.base_learner "$base/checkpoints/last.ckpt"
for method in prototypes bam cgmgm; do
    run=$runs/$method/$name tests=()
    how=(--config "$run/config.yaml" --ckpt_path "$run/checkpoints/last.ckpt")
    if [ $method = prototypes ]; then # untrained: what is kept as its training is the base learner's
        run=$base
        how=(--config experiments/$dataset/prototypes.yaml "${data[@]}" --model.base_learner "$base/checkpoints/last.ckpt")
    fi
    for shots in 1 5; do
        test=$runs/$method/${name}_${shots}shot
        [ -e "$test/metrics.json" ] || genseg test "${how[@]}" --data.shots $shots --report.num_pictures 8 \
            --trainer.logger.init_args.save_dir "$runs" --trainer.logger.init_args.name "$method" \
            --trainer.logger.init_args.version "${name}_${shots}shot"
        tests+=("${shots}shot=$test")
    done
    python experiments/make_results.py add "$dataset/$method/fold$fold" "$run" "${tests[@]}"
done
