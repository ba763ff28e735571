#!/bin/sh
# Tries the service on a Citus cluster: deploy/try-citus.sh PROGRAMS
#
# PROGRAMS is the folder of initdb, postgres and psql of a Postgres in which Citus is installed, for example
# /usr/lib/postgresql/15/bin. Install both before; this script installs nothing. It also needs what the tests need: `npm ci`,
# and redis-server on the PATH.
#
# It starts a coordinator, two workers and a plain Postgres on free ports of 127.0.0.1, applies sql/ and deploy/citus.sql, and
#
#   1. inserts users through all nodes at the same time, and compares their ids;
#   2. runs tests of the contract through the coordinator and through a worker;
#   3. kills a worker (SIGKILL) and suspends one (SIGSTOP) during sign-ups, and compares all replies with the rows;
#   4. compares the sign-ups per second with those of the plain Postgres.
#
# It takes five to ten minutes. The exit code is 0 if nothing failed in 1 to 3. All servers end with it, and its folder is deleted.
set -eu

programs=${1:?usage: deploy/try-citus.sh PROGRAMS}
for program in initdb postgres psql; do
  [ -x "$programs/$program" ] || { echo "try-citus: $programs has no program $program" >&2; exit 1; }
done
programs=$(cd "$programs" && pwd)

cd "$(dirname "$0")/.."
npm run --silent build
exec node --import=tsx/esm test/citus.ts "$programs"
