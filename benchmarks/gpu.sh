#!/usr/bin/env bash
# Tests and timings on one NVIDIA GPU, in under ten minutes; report.txt and three grids in $OUT.
# Uses `python3` as it is: torch 2.11 or newer with CUDA, torchvision, numpy, tqdm, tensorboard and pytest.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu_results}
RUNS=$(mktemp -d)
trap 'rm -rf "$RUNS"' EXIT
mkdir -p "$OUT"
exec > >(tee "$OUT/report.txt") 2>&1
export PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader

echo "== the fast path against the plain one, and a first run: graph captured, smaller last batch included"
timeout 120 python3 -m pytest -v tests/test_cuda.py | tail -n 60
timeout 45 python3 acgan.py --seed 0 --max_steps 3000 --out_dir "$RUNS/first"

echo "== the whole run: 200 epochs with default flags"
start=$(date +%s%N)
timeout 170 python3 acgan.py --seed 0 --n_epochs 200 --out_dir "$RUNS/full" > "$RUNS/full.txt" 2>&1
echo "exit status $? (124: not done in 170 s), $((($(date +%s%N) - start) / 1000000)) ms"
head -n 4 "$RUNS/full.txt"
tail -n 4 "$RUNS/full.txt"
for batch in 4000 40000 187200; do
  [ -f "$RUNS/full/images/$batch.png" ] && cp "$RUNS/full/images/$batch.png" "$OUT/"
done

echo "== batches a second, beside the tutorial's loop: float32 (TF32), then bf16, then compiled"
for flags in "" "--amp bf16" "--compile on"; do
  # shellcheck disable=SC2086 (the flags are words)
  timeout 80 python3 benchmarks/throughput.py --device cuda --rounds 5 --batches 100 $flags
done
