#!/bin/sh
# Installs what npm does not have: a Redis server and, with the argument `tests`, the programs that only tests use.
set -eu

root=$([ "$(id -u)" -eq 0 ] || echo sudo)
is_there() { command -v "$1" >/dev/null 2>&1; }

install() {
  if is_there apt-get; then
    # RUNLEVEL=1: otherwise Debian's package starts a server on port 6379, which this project does not use.
    $root apt-get update -qq &&
      $root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "$1"
  elif is_there dnf; then
    $root dnf install -y -q "${1%-server}"
  elif is_there apk; then
    $root apk add --quiet "${1%-server}"
  else
    brew install --quiet "${1%-server}"
  fi
}

# need PROGRAM…: if none of them is on the PATH, installs the first package with such a name.
need() {
  for program in "$@"; do
    if is_there "$program"; then return; fi
  done
  for program in "$@"; do
    echo "setup: installing $program"
    if install "$program"; then return; fi
  done
  echo "setup: install one of these programs yourself: $*" >&2
  exit 1
}

need redis-server valkey-server
if [ "${1:-}" = tests ]; then
  # For testkit/browser.ts, testkit/topologies.ts and test/deploy.test.ts.
  need chromium-headless-shell chromium chromium-browser google-chrome
  need openssl
  need pgbouncer
  need nginx
  need haproxy
fi
echo 'setup: done'
