#!/usr/bin/env bash
# Runs each test file many times in a row while busy loops take the cores: a flaky test fails here first.
#
#   test/under-load.sh [FILE…]     all test files by default
#
# RUNS (20) of each file, LOOPS (4) busy loops, JOBS (2) files at once. The output of a failed run is kept and named.
set -euo pipefail
cd "$(dirname "$0")/.."

export RUNS=${RUNS:-20}
# The output of failed runs.
LOGS=$(mktemp -d)
export LOGS

# Runs one file RUNS times, and prints one line about it. The runner of tap would take as much CPU time as most files.
run_file() {
  local file=$1 passed=0 started=$SECONDS log
  for run in $(seq "$RUNS"); do
    log="$LOGS/$(basename "$file" .test.ts)-$run.log"
    if TAP_TIMEOUT=300 node --import=tsx/esm "$file" >"$log" 2>&1; then
      passed=$((passed + 1))
      rm "$log"
    else
      echo "$file: run $run failed: $log"
    fi
  done
  echo "$file: $passed of $RUNS passed, $(((SECONDS - started) / RUNS)) s each"
  [ "$passed" -eq "$RUNS" ]
}
export -f run_file

npm run --silent build
loops=()
for _ in $(seq "${LOOPS:-4}"); do
  (while :; do :; done) &
  loops+=($!)
done
trap 'kill "${loops[@]}"' EXIT

[ $# -gt 0 ] || set -- test/*.test.ts
printf '%s\n' "$@" | xargs -P "${JOBS:-2}" -I '{}' bash -c 'run_file "{}"'
