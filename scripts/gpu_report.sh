#!/usr/bin/env bash
# bash scripts/gpu_report.sh [--dry-run] [--quick]: everything this project wants to know of an NVIDIA GPU, by one command.
# The gpu tests, what a step launches, latency at true sizes, break-even by resolution and batch, and the pictures go into
# docs/results/latency/<gpu>/, ready to commit; a step that is there already is not run again, one that fails is named at the end.
# --dry-run prints the commands, on any machine; --quick takes the first model and the smallest grid only.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
dry="" quick=""
for option in "$@"; do
    case "$option" in
        --dry-run) dry=yes ;;
        --quick) quick=yes ;;
        -h | --help) sed -n '2,5s/^# //p' "$0"; exit 0 ;;
        *) echo "error: $option is not an option; use --dry-run or --quick" >&2; exit 2 ;;
    esac
done
if [ -n "$dry" ]; then
    gpu="GPU"
elif ! gpu="$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1)" || [ -z "$gpu" ]; then
    echo "error: no NVIDIA GPU was found; --dry-run shows what would run" >&2
    exit 2
fi
cd "$root"
[ -n "$dry" ] || . "$root/scripts/env.sh" eval
folder="docs/results/latency/$(printf %s "$gpu" | tr -cs 'A-Za-z0-9' '-' | sed 's/-*$//')"
failed=()

# step FILE COMMAND…: run a command that makes a file, unless the file is there.
step() {
    local made="$folder/$1"
    shift
    if [ -n "$dry" ]; then
        echo "$*"
    elif [ ! -e "$made" ]; then
        echo "== $*" >&2
        "$@" || failed+=("$made")
    fi
}
# kept FILE COMMAND…: the same for a command that prints what belongs into the file.
kept() {
    local made="$folder/$1"
    shift
    if [ -n "$dry" ]; then
        echo "$* > $made"
    elif [ ! -e "$made" ]; then
        echo "== $*" >&2
        if "$@" >"$made.part" 2>&1; then mv "$made.part" "$made"; else failed+=("$made"); fi
    fi
}

[ -n "$dry" ] || mkdir -p "$folder"
kept machine.txt nvidia-smi
kept tests.txt python -m pytest -m gpu -q
latency=(python -m libra.latency --random-weights)
for kernels in torch triton; do
    kept "launches_$kernels.txt" env LIBRA_KERNELS="$kernels" "${latency[@]}" --config llava7b_r50 --decode 8
done

rows=(llava7b_r50 llava7b_r67 table3/llava7b_libra_r80 llava7b_fastv)
batches=(1)
if [ -z "$quick" ]; then
    rows+=(llava13b_r50 llava13b_fastv next8b_r50 next8b_r67 next8b_fastv table7/qwen2vl7b_libra_hybrid)
    batches+=(8 32)
fi
for row in "${rows[@]}"; do
    name="${row//\//_}"
    sizes=()
    if [ "$row" = table7/qwen2vl7b_libra_hybrid ]; then sizes=(--visual-tokens 4096); fi
    for batch in "${batches[@]}"; do
        for attention in eager sdpa; do
            stem="${name}_${attention}_batch$batch"
            step "$stem.json" "${latency[@]}" --config "$row" "${sizes[@]}" --batch "$batch" --attn "$attention" \
                --decode 32 --json "$folder/$stem.json" --plot "$folder/$stem.png"
        done
    done
done
# End to end: tower, selection and prefill of every method, and from which resolution and batch a method pays.
step vision.json "${latency[@]}" --config llava7b_r50 --vision --decode 32 --json "$folder/vision.json"
step methods.json python -m libra.latency.methods --json "$folder/methods.json"
grid=()
if [ -n "$quick" ]; then grid=(--visual-tokens 144,576 --batch 1,8); fi
step growth/growth.png "${latency[@]}" --config llava7b_r50 --grow --output "$folder/growth" "${grid[@]}"
for keep in 192 128 64; do
    step "selectors_$keep.json" python -m libra.latency.selectors --keep "$keep" --json "$folder/selectors_$keep.json"
done

if [ -n "$dry" ]; then exit 0; fi
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "$folder is complete; commit it"
