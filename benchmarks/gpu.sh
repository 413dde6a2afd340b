#!/usr/bin/env bash
# Tests and timings on one NVIDIA GPU, in under ten minutes; results and grids below $OUT.
# Uses `python3` as it is: torch 2.11 or newer with CUDA, torchvision, numpy, tqdm, tensorboard and pytest.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu_results}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$OUT/gpu.txt"

echo "== the fast path against the plain one, and a first run: graph captured, smaller last batch included"
timeout 90 python3 -m pytest -q tests/test_cuda.py 2>&1 | tail -n 15 | tee "$OUT/test_cuda.txt"
timeout 45 python3 acgan.py --seed 0 --max_steps 5000 --log_interval 1 --out_dir "$OUT/first" 2>&1 | tee "$OUT/first.txt"

echo "== the whole run: 200 epochs with default flags"
start=$(date +%s%N)
timeout 150 python3 acgan.py --seed 0 --n_epochs 200 --out_dir "$OUT/full" > "$OUT/full.txt" 2>&1
echo "exit status $?, $((($(date +%s%N) - start) / 1000000)) ms" | tee "$OUT/wall_clock.txt"
tail -n 3 "$OUT/full.txt"
cp "$OUT"/full/images/{4000,40000,187200}.png "$OUT/" 2>/dev/null

echo "== batches a second, beside the tutorial's loop: float32 (TF32), then bf16, then compiled"
for flags in "" "--amp bf16" "--compile on"; do
  # shellcheck disable=SC2086 (the flags are words)
  timeout 80 python3 benchmarks/throughput.py --device cuda --rounds 5 --batches 100 $flags 2>&1 | tee -a "$OUT/throughput.txt"
done
