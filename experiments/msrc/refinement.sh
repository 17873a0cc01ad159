#!/bin/bash
# CGMGM's guidance alone, untrained, by how its first mask is refined: refinement.sh FOLD, after ../fewshot.sh msrc FOLD 0
#
#   DATA=PATH/data experiments/msrc/refinement.sh 0
#
# One example; the last variant has mixtures of the supports alone, for which a first mask of the query is not needed.
set -euo pipefail
fold=$1 runs=${RUNS:-runs}/msrc
base=$runs/base_learner/fold$fold/seed0
for variant in none cycle cycle_support supports; do
    options=(--model.matching.refinement "$variant")
    [ $variant != supports ] || options=(--model.mixture.query_statistics false)
    test=$runs/refinement/$variant/fold$fold
    [ -e "$test/metrics.json" ] || genseg test --config experiments/msrc/cgmgm.yaml --data.data.root "$DATA/msrc_v2" \
        --data.folds "$DATA/msrc_v2/fewshot_folds.json" --data.fold "$fold" --model.base_learner "$base/checkpoints/last.ckpt" \
        --model.answer guidance --model.ensemble false "${options[@]}" --seed_everything 0 \
        --trainer.logger.init_args.save_dir "$runs" --trainer.logger.init_args.name refinement \
        --trainer.logger.init_args.version "$variant/fold$fold"
    python experiments/make_results.py add "msrc/refinement/$variant/fold$fold" "$base" "1shot=$test"
done
