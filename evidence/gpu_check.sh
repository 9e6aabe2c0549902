#!/usr/bin/env bash
# Runs the tests marked gpu and the GPU's comparisons, in under six minutes on an H100, and prints one table.
#   evidence/gpu_check.sh [arguments of evidence.benchmark, as --pairs 7 or --parts comparisons steps training]
# PYTHON: the interpreter (.venv's by default). LIMIT: seconds for both (345). Logs: output/gpu_check/.
set -uo pipefail
cd "$(dirname "$0")/.."
limit=${LIMIT:-345}
python=${PYTHON:-.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
folder=output/gpu_check
mkdir -p "$folder"
rm -f "$folder/benchmark.md"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

timeout -k 5 $((limit / 2)) "$python" -m pytest -m gpu -p no:cacheprovider \
  $(grep -rl --include='test_*.py' 'mark\.gpu' tests) >"$folder/tests.log" 2>&1
tests=$?
timeout -k 5 $((limit - SECONDS)) "$python" -m evidence.benchmark --device cuda --pairs 5 \
  --parts comparisons training --output "$folder" "$@" >"$folder/benchmark.log" 2>&1
benchmark=$?

said() { [ "$1" = 124 ] || [ "$1" = 137 ] && echo "cut off for time" || tail -n 1 "$2" | cut -c -200; }
echo "tests: $(said $tests "$folder/tests.log")"
[ $benchmark = 0 ] || echo "benchmark: $(said $benchmark "$folder/benchmark.log")"
[ ! -f "$folder/benchmark.md" ] ||
  awk 'NR == 3; /^## /{on = $2 == "Aims" || $2 == "Not"} on && /^\|/' "$folder/benchmark.md"
echo "in $SECONDS s; more in $folder/benchmark.md, tests.log and benchmark.log"
[ $tests = 0 ] && [ $benchmark = 0 ]
