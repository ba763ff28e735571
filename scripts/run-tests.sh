#!/usr/bin/env bash
# Runs all tests, and prints what failed. The last line is "N passed, N failed". Fails also if no test has run.
#
#   scripts/run-tests.sh [--coverage]     coverage: of each file of src, at least 90 % of the lines
set -uo pipefail

echo "Node.js $(node --version)"
log=$(mktemp)
trap 'rm "$log"' EXIT
npm test -- ${1:+--no-disable-coverage} >"$log" 2>&1
status=$?
[ $status = 0 ] || grep -v '^ *ok ' "$log"

[ $# = 0 ] || node -e '
  const { total, ...files } = JSON.parse(fs.readFileSync(".tap/report/coverage-summary.json", "utf8"))
  const low = Object.entries(files).filter(([, { lines }]) => lines.pct < 90)
  for (const [file, { lines }] of low) console.log(`${file}: only ${lines.pct} % of its lines are covered`)
  console.log(`${Object.keys(files).length} files, ${total.lines.pct} % of all lines`)
  process.exit(low.length)
' || status=1

# A line of tap: # { total: 3, pass: 2, fail: 1 }
read -r total passed < <(sed -nE 's/^# \{ total: ([0-9]+), pass: ([0-9]+).*/\1 \2/p' "$log") || status=1
echo "${passed:-0} passed, $((${total:-0} - ${passed:-0})) failed"
[ "${total:-0}" = "${passed:-none}" ] || status=1
exit "$status"
