#!/bin/sh
# Installs what the embedded mode and the tests need and npm does not have: a Redis server.
set -eu

for server in redis-server valkey-server; do
  if command -v "$server" >/dev/null 2>&1; then
    echo "setup: $server is there: $(command -v "$server"); nothing to install"
    exit 0
  fi
done

fail() {
  echo "setup: install redis-server or valkey-server yourself, so that it is on the PATH ($1)" >&2
  exit 1
}

as_root() {
  if [ "$(id -u)" -eq 0 ]; then
    "$@"
  elif command -v sudo >/dev/null 2>&1; then
    sudo "$@"
  else
    fail "neither root nor sudo"
  fi
}

if command -v apt-get >/dev/null 2>&1; then
  echo 'setup: installing redis-server with apt-get'
  as_root apt-get update -qq || fail 'apt-get update failed'
  # The package would start a server of its own on port 6379, which this project does not use.
  as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends redis-server ||
    fail 'apt-get install failed'
elif command -v dnf >/dev/null 2>&1; then
  echo 'setup: installing redis or valkey with dnf'
  as_root dnf install -y -q redis || as_root dnf install -y -q valkey || fail 'dnf install failed'
elif command -v apk >/dev/null 2>&1; then
  echo 'setup: installing redis with apk'
  as_root apk add --quiet redis || fail 'apk add failed'
elif command -v brew >/dev/null 2>&1; then
  echo 'setup: installing redis with brew'
  brew install --quiet redis || fail 'brew install failed'
else
  fail 'no apt-get, dnf, apk or brew here'
fi
echo 'setup: done'
