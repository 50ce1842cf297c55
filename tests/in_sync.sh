#!/usr/bin/env bash
# The notebooks, the package and the README say the same thing: exporting, cleaning and rendering again, in a copy, changes no file.
set -euo pipefail
cd "$(dirname "$0")/.."
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r nbs mdl_nbdev settings.ini README.md README_zh.md "$copy"
find "$copy" -name .ipynb_checkpoints -prune -exec rm -rf {} +
(cd "$copy" && nbdev_export && nbdev_clean)
python docs/readme.py "$copy/nbs" "$copy"
differing=0
for path in nbs mdl_nbdev README.md README_zh.md; do
    diff -rq -x __pycache__ -x .ipynb_checkpoints "$path" "$copy/$path" || differing=1
done
if [ $differing = 1 ]; then
    echo "Out of sync: run nbdev_export, nbdev_clean and python docs/readme.py, then look at the files named above." >&2
    exit 1
fi
echo "In sync: notebooks, package and README."
