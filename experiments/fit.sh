# Sourced by the scripts of the data sets: fit RUNS NAME VERSION OPTION ... trains into RUNS/NAME/VERSION.
# A training that stopped goes on from its last checkpoint, at the same commit; one that ended is not done again.
fit() {
    local runs=$1 name=$2 version=$3; shift 3
    local run=$runs/$name/$version resume=()
    if [ -e "$run/val_metrics.json" ] && [ ! -e "$run/unfinished" ]; then return; fi
    [ ! -e "$run/checkpoints/last.ckpt" ] || resume=(--ckpt_path "$run/checkpoints/last.ckpt")
    mkdir -p "$run"; touch "$run/unfinished"
    python experiments/make_results.py origin "$run"
    genseg fit "$@" ${resume[@]+"${resume[@]}"} --trainer.logger.init_args.save_dir "$runs" \
        --trainer.logger.init_args.name "$name" --trainer.logger.init_args.version "$version"
    if [ ! -e "$run/val_metrics.json" ]; then
        echo "fit: $run ended without val_metrics.json: remove the folder and start again" >&2
        return 1
    fi
    rm "$run/unfinished"
}
