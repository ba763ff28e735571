#!/bin/sh
# Installs what npm does not have: a Redis server and, with the argument `tests`, the programs that only tests use.
set -eu

as_root() {
  if [ "$(id -u)" -eq 0 ]; then
    "$@"
  elif command -v sudo >/dev/null 2>&1; then
    sudo "$@"
  else
    echo 'setup: needs root or sudo' >&2
    return 1
  fi
}

# RUNLEVEL=1: otherwise Debian's package starts a server on port 6379, which this project does not use.
install() {
  echo "setup: installing $1"
  if command -v apt-get >/dev/null 2>&1; then
    as_root apt-get update -qq &&
      as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "$1"
  elif command -v dnf >/dev/null 2>&1; then
    as_root dnf install -y -q "$1"
  elif command -v apk >/dev/null 2>&1; then
    as_root apk add --quiet "$1"
  elif command -v brew >/dev/null 2>&1; then
    brew install --quiet "$1"
  else
    echo 'setup: found none of apt-get, dnf, apk and brew' >&2
    return 1
  fi
}

# need PACKAGES PROGRAMS: if none of the programs is on the PATH, installs the first package that exists.
need() {
  for program in $2; do
    if command -v "$program" >/dev/null 2>&1; then
      echo "setup: $program is installed: $(command -v "$program")"
      return
    fi
  done
  for package in $1; do
    if install "$package"; then return; fi
  done
  echo "setup: install one of these programs yourself: $2" >&2
  exit 1
}

if command -v apt-get >/dev/null 2>&1; then redis=redis-server; else redis='redis valkey'; fi
need "$redis" 'redis-server valkey-server'
if [ "${1:-}" = tests ]; then
  # testkit/browser.ts looks for these.
  need chromium 'chromium chromium-browser google-chrome'
  need openssl openssl
  # testkit/pooler.ts looks for it.
  need pgbouncer pgbouncer
  # test/gateways.test.ts runs them.
  need nginx nginx
  need haproxy haproxy
fi
echo 'setup: done'
