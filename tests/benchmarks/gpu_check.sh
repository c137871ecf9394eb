#!/usr/bin/env bash
# The whole check on the first GPU, about 8 minutes. Run it in the root of the repository. Further
# flags are passed on. Files go to $OUT, by default a temporary folder.
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
: "${OUT:=$(mktemp -d)}"
export OUT
set -o pipefail
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
python3 "$(dirname "$0")/gpu_check.py" --device cuda:0 --seconds 530 "$@" 2>&1 |
    grep -v -e Warning -e profiler_st -e 'warnings.warn' | tee "$OUT/gpu_check.log"
