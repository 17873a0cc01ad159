#!/bin/bash
# CGMGM's guidance alone, untrained, by how its first mask is refined: refinement.sh FOLD SEED, after ../fewshot.sh msrc FOLD SEED
#
#   DATA=PATH/data experiments/msrc/refinement.sh 0 0
#
# One example; the last variant has mixtures of the supports alone, for which a first mask of the query is not needed.
set -euo pipefail
fold=$1 seed=$2 runs=${RUNS:-runs}/msrc
base=$runs/base_learner/fold$fold/seed$seed
for variant in none cycle cycle_support supports; do
    options=(--model.matching.refinement "$variant")
    [ $variant != supports ] || options=(--model.mixture.query_statistics false)
    name=$variant/fold$fold/seed$seed
    [ -e "$runs/refinement/$name/metrics.json" ] || genseg test --config experiments/msrc/cgmgm.yaml \
        --data.data.root "$DATA/msrc_v2" --data.folds "$DATA/msrc_v2/fewshot_folds.json" --data.fold "$fold" \
        --model.base_learner "$base/checkpoints/last.ckpt" --model.answer guidance --model.ensemble false "${options[@]}" \
        --seed_everything "$seed" --trainer.logger.init_args.save_dir "$runs" --trainer.logger.init_args.name refinement \
        --trainer.logger.init_args.version "$name"
    python experiments/make_results.py add "msrc/refinement/$variant/fold$fold" "$base" "1shot=$runs/refinement/$name"
done
