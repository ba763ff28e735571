#!/usr/bin/env bash
# Tries the service on a Citus cluster: deploy/try-citus.sh PROGRAMS
#
# PROGRAMS is the folder of initdb, pg_ctl and psql of a Postgres in which Citus is installed, for example
# /usr/lib/postgresql/15/bin. It also needs what the tests need: `npm ci`, and redis-server on the PATH.
#
# It starts a coordinator and two workers on 127.0.0.1, ports 9701 to 9703, and applies sql/ and deploy/citus.sql. Then it
# inserts users through all nodes at the same time, compares their ids, and runs tests through the coordinator and a worker.
set -euo pipefail
programs=$(cd "${1:?usage: deploy/try-citus.sh PROGRAMS}" && pwd)
cd "$(dirname "$0")/.."
nodes=(9701 9702 9703)
tests=(sign-up races password-reset sessions claims epochs faults)

folder=$(mktemp -d)
# Postgres refuses to run as root.
if [ "$(id -u)" = 0 ]; then as=(setpriv --reuid=65534 --regid=65534 --clear-groups); else as=(); fi
finish() {
  for port in "${nodes[@]}"; do "${as[@]}" "$programs/pg_ctl" -s -D "$folder/$port" -m immediate stop || true; done
  rm -r "$folder"
}
trap finish EXIT

secret=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
echo "$secret" >"$folder/secret"
# Each node logs in on the others with it.
echo "*:*:*:*:$secret" >"$folder/pgpass"
chmod 600 "$folder/secret" "$folder/pgpass"
[ "$(id -u)" != 0 ] || chown -R 65534:65534 "$folder"
export PGPASSFILE=$folder/pgpass

url() { echo "postgresql://postgres:$secret@127.0.0.1:$1/postgres"; }
# sql PORT STATEMENT
sql() { "$programs/psql" "$(url "$1")" -XqAt -v ON_ERROR_STOP=1 -c "$2"; }

for port in "${nodes[@]}"; do
  "${as[@]}" "$programs/initdb" -D "$folder/$port" -U postgres -A scram-sha-256 --pwfile="$folder/secret" >"$folder/initdb.log"
  # By default packaged builds report to their maker, and nodes talk over TLS and call themselves localhost.
  cat >>"$folder/$port/postgresql.conf" <<EOF
port = $port
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
max_connections = 300
shared_preload_libraries = 'citus'
citus.enable_statistics_collection = off
citus.node_conninfo = 'sslmode=disable'
citus.local_hostname = '127.0.0.1'
EOF
  "${as[@]}" "$programs/pg_ctl" -s -w -D "$folder/$port" -l "$folder/$port.log" start
  sql "$port" 'CREATE EXTENSION citus'
done
coordinator=${nodes[0]}
sql "$coordinator" "SELECT citus_set_coordinator_host('127.0.0.1', $coordinator)"
for port in "${nodes[@]:1}"; do sql "$coordinator" "SELECT citus_add_node('127.0.0.1', $port)"; done
npm run --silent build
DATABASE_URL=$(url "$coordinator") node dist/migrate.js
"$programs/psql" "$(url "$coordinator")" -Xq -v ON_ERROR_STOP=1 -f deploy/citus.sql >"$folder/citus.log"

inserts=()
for port in "${nodes[@]}"; do
  sql "$port" "INSERT INTO users (name, mobile, password_hash)
    SELECT '', ($port * 1000000::bigint + n)::text, '' FROM generate_series(1, 20000) n" &
  inserts+=($!)
done
for insert in "${inserts[@]}"; do wait "$insert"; done
# Users, different ids, and the nodes in the ids.
counts=$(sql "$coordinator" 'SELECT count(*), count(DISTINCT id), count(DISTINCT id >> 16 & 63) FROM users')
echo "users | ids | nodes: $counts"
[ "$counts" = '60000|60000|3' ]

for port in "${nodes[@]:0:2}"; do
  for test in "${tests[@]}"; do
    echo "test/$test.test.ts through port $port"
    sql "$port" 'TRUNCATE users'
    TESTBED_STORES=$(url "$port") npx tap --disable-coverage "test/$test.test.ts" >"$folder/tap.log" || { cat "$folder/tap.log"; exit 1; }
  done
done
echo 'passed'
