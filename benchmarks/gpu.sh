#!/usr/bin/env bash
# Run gpu.py on a machine without a network: add the wheels that it lacks, in a temporary folder, then measure.
#     benchmarks/gpu.sh --out OUT [options of gpu.py]
# PYTHON names the Python that has torch (default python3), WHEELS the folder that gpu_wheels.py filled (default benchmarks/wheels).
set -euo pipefail
began=$(date +%s)
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$python" "$here/gpu_wheels.py" "${WHEELS:-$here/wheels}" --lacking > "$site/lacking.txt"
if [ -s "$site/lacking.txt" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" -r "$site/lacking.txt"
fi
export PYTHONPATH="$here/..:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
"$python" "$here/gpu.py" --since "$began" "$@"
