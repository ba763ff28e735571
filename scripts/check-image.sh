#!/usr/bin/env bash
# Builds the image of the Dockerfile without a registry, runs it, and checks what docs/operating.md says about it.
# Needs root on Linux with the packages of Debian, and `npm ci`.
#
#   scripts/check-image.sh [DOCKERFILE]
#
# Exit code 1: the image breaks a promise. A machine that cannot build or run any image ends the check with the line
# `image: not checked: REASON` and exit code 0. Only the preparations may end so: they build and run the base alone. What
# fails after them is the image's fault.
# shellcheck disable=SC2016 # mmdebstrap's hooks expand $1, not this script
set -euo pipefail
cd "$(dirname "$0")/.."

dockerfile=${1:-Dockerfile}
base=$(sed -n 's/^FROM \(node:[^ ]*\).*/\1/p' "$dockerfile" | head -1)
image=mobile-signup:check
scratch=$(mktemp -d)
log=$scratch/log
storage=
stores=
container=

step() { echo "image: $*"; }

not_checked() {
  tail -n 5 "$log" >&2 || true
  echo "image: not checked: $*"
  exit 0
}

fail() {
  [ -z "$container" ] || podman logs "$container" >>"$log" 2>&1 || true
  tail -n 30 "$log" >&2 || true
  echo "image: FAILED: $*"
  exit 1
}

clean_up() {
  status=$?
  trap - EXIT
  {
    [ -z "$stores" ] || { kill "$stores" && wait "$stores"; }
    # Only in the storage of this check.
    [ -z "$storage" ] || podman --root "$storage" --runroot "$scratch/run" rm --force --all --time 0
    [ -z "$storage" ] || buildah --root "$storage" --runroot "$scratch/run" rm --all
    awk -v scratch="$scratch/" 'index($2, scratch) == 1 { print $2 }' /proc/mounts | sort -r | xargs -r umount
  } >/dev/null 2>&1 || true
  # One file system: a mount that is left over may be a folder of this machine.
  rm -rf --one-file-system "$scratch"
  exit "$status"
}
trap clean_up EXIT
: >"$log"
# Other users enter it: apt's, and that of the private Postgres.
chmod 711 "$scratch"
mkdir "$scratch/tmp"
chmod 1777 "$scratch/tmp"
export TMPDIR=$scratch/tmp

# --- Preparations: the tools, the base, and proof that this machine builds and runs containers. -------------------------

[ "$(uname)" = Linux ] || not_checked 'this is not Linux'
[ "$(id -u)" -eq 0 ] || not_checked 'only root can build the base'
command -v apt-get >/dev/null || not_checked 'there is no apt-get to make the base with'
for program in node npm curl; do command -v "$program" >/dev/null || fail "$program is not on the PATH"; done
[ -d node_modules/tsx ] || fail 'run npm ci first'

# The storage and all state are in the scratch folder, so nothing of this machine's own containers is touched.
export CONTAINERS_STORAGE_CONF=$scratch/storage.conf CONTAINERS_CONF=$scratch/containers.conf
# crun refuses a hybrid of cgroups v1 and v2, and only systemd provides the other manager. Some machines cannot raise the
# limits to Podman's defaults.
cat >"$CONTAINERS_CONF" <<END
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
tmp_dir = "$scratch/run/libpod"
[containers]
default_ulimits = ["nofile=8192:8192", "nproc=8192:8192"]
END
# Otherwise Podman asks systemd to run the HEALTHCHECK.
export DISABLE_HC_SYSTEMD=true

missing=
for program in buildah podman runc mmdebstrap jq; do
  command -v "$program" >/dev/null || missing="$missing $program"
done
if [ -n "$missing" ]; then
  step "installing$missing"
  # shellcheck disable=SC2086 # one word for each package
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -o DPkg::Lock::Timeout=300 -y -qq \
    --no-install-recommends $missing; } >>"$log" 2>&1 </dev/null || not_checked "apt-get cannot install$missing"
fi

# A scratch folder on an overlay, as in a container, allows no other overlay on it.
for driver in overlay vfs; do
  printf '[storage]\ndriver = "%s"\ngraphroot = "%s"\nrunroot = "%s"\n' \
    "$driver" "$scratch/$driver" "$scratch/run" >"$CONTAINERS_STORAGE_CONF"
  if podman info >>"$log" 2>&1; then
    storage=$scratch/$driver
    break
  fi
done
[ -n "$storage" ] || not_checked 'Podman cannot use its storage'

# node:24.12.0-bookworm-slim
node_version=${base#node:}
node_version=${node_version%%-*}
suite=${base#node:*-}
suite=${suite%-slim}
[[ $node_version =~ ^[0-9]+\.[0-9]+\.[0-9]+$ ]] || fail "the tag of $base is not exact"
[[ $base != *@* ]] || not_checked "only a registry has the digest of $base"

step "making a stand-in for $base from Debian's packages and Node.js from npm"
# No package of another origin belongs into the base.
debian_sources() {
  apt-get indextargets --format '$(SOURCESENTRY)' 'Created-By: Packages' 'Origin: Debian' "Codename: $suite"
}
[ -n "$(debian_sources)" ] || apt-get update -qq >>"$log" 2>&1 || not_checked 'apt-get cannot update'
[ -n "$(debian_sources)" ] || not_checked "the package sources of this machine have no Debian $suite"
# Each is FILE:NUMBER.
mapfile -t sources < <(debian_sources | cut -d : -f 1 | sort -u)
local=$scratch/base/usr/local
mkdir -p "$local/bin" "$local/lib/node_modules/npm" "$scratch/node"
for package in "node-linux-$(node -p process.arch)@$node_version" "npm@$(npm --version)"; do
  npm pack --silent --pack-destination "$scratch" "$package" >>"$log" 2>&1 </dev/null || not_checked "npm has no $package"
done
tar -xzf "$scratch"/node-linux-*.tgz -C "$scratch/node" --strip-components 1
tar -xzf "$scratch"/npm-*.tgz -C "$local/lib/node_modules/npm" --strip-components 1
install -m 755 "$scratch/node/bin/node" "$local/bin/node"
ln -s ../lib/node_modules/npm/bin/npm-cli.js "$local/bin/npm"
printf '#!/bin/sh\nexec "$@"\n' >"$local/bin/docker-entrypoint.sh"
chmod 755 "$local/bin/docker-entrypoint.sh" "$local/lib/node_modules/npm/bin/npm-cli.js"
mmdebstrap --quiet --mode=root --variant=minbase \
  --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
  --dpkgopt='path-exclude=/usr/share/locale/*' \
  --customize-hook="cp -r --preserve=mode,links '$scratch/base/.' \"\$1\"" \
  --customize-hook='chroot "$1" useradd --uid 1000 --user-group --create-home node' \
  "$suite" "$scratch/base.tar" "${sources[@]}" >>"$log" 2>&1 </dev/null || not_checked 'mmdebstrap cannot make the base'
podman import --quiet --change 'ENTRYPOINT ["docker-entrypoint.sh"]' --change 'CMD ["node"]' \
  "$scratch/base.tar" "$base" >>"$log" 2>&1 || not_checked 'Podman cannot store an image'
rm "$scratch/base.tar"

# The build uses the npm registry of this machine, and its CA if it has one of its own. No layer keeps either.
build_options=(--isolation chroot --network host --volume "$scratch/npmrc:/root/.npmrc:ro")
echo "registry=$(npm config get registry)" >"$scratch/npmrc"
if [ -n "${NODE_EXTRA_CA_CERTS:-}" ]; then
  build_options+=(--volume "$NODE_EXTRA_CA_CERTS:/run/extra-ca.crt:ro")
  echo 'cafile=/run/extra-ca.crt' >>"$scratch/npmrc"
fi
run_options=(--network host --read-only --read-only-tmpfs=false --cap-drop ALL --security-opt no-new-privileges)

step 'trying the base alone'
container=$(buildah from --pull-never "$base" 2>>"$log") || not_checked 'Buildah cannot start a build'
buildah run "${build_options[@]}" "$container" -- node --version >>"$log" 2>&1 ||
  not_checked 'Buildah cannot run a command'
buildah run "${build_options[@]}" "$container" -- npm view npm version >>"$log" 2>&1 ||
  not_checked 'a build cannot reach the npm registry'
buildah rm "$container" >>"$log"
container=
podman run --rm "${run_options[@]}" "$base" node --version >"$scratch/version" 2>>"$log" ||
  not_checked 'Podman cannot run a container'
[ "$(cat "$scratch/version")" = "v$node_version" ] || not_checked "the base has Node.js $(cat "$scratch/version")"

# --- From here on, every failure is one of the image. -------------------------------------------------------------------

now() { date +%s.%N; }
seconds_since() { awk -v from="$1" -v to="$(now)" 'BEGIN { printf "%.2f", to - from }'; }
is_below() { awk -v value="$1" -v limit="$2" 'BEGIN { exit !(value < limit) }'; }

step "building $dockerfile"
start=$(now)
buildah bud --pull-never --format docker "${build_options[@]}" --file "$dockerfile" --tag "$image" . >>"$log" 2>&1 ||
  fail 'the build'
step "built in $(seconds_since "$start") s"

size_of() { podman image inspect --format '{{.Size}}' "$1"; }
megabytes() { awk -v bytes="$1" 'BEGIN { printf "%.1f MB", bytes / 1e6 }'; }
added=$(($(size_of "$image") - $(size_of "$base")))
step "size: the Dockerfile adds $(megabytes "$added") to the $(megabytes "$(size_of "$base")") of the stand-in"

# All changes are below /app, and /app has only these entries. So no layer has a package manager's cache, an npmrc or a key.
podman diff "$image" "$base" >"$scratch/diff" 2>>"$log" || fail 'podman diff'
grep -q ' /app/dist' "$scratch/diff" || fail 'podman diff does not show /app/dist'
! grep -vE '^[ACD] /app(/|$)' "$scratch/diff" || fail 'it changes files outside of /app'
container=$(podman create "$image")
podman export "$container" | tar -t | sed 's|/$||' >"$scratch/files"
podman rm "$container" >>"$log"
container=
entries=$(sed -n 's|^app/\([^/]\+\).*|\1|p' "$scratch/files" | sort -u | xargs)
[ "$entries" = 'dist node_modules package.json sql' ] || fail "/app has the entries $entries"
! grep '^app/node_modules/\.cache' "$scratch/files" || fail 'node_modules has a cache'
jq -r '.packages | to_entries[] | select(.value.dev) | "app/" + .key' package-lock.json >"$scratch/development"
[ -s "$scratch/development" ] || fail 'package-lock.json has no development dependency'
! grep -xFf "$scratch/development" "$scratch/files" || fail 'it has these development dependencies'
step "none of the $(wc -l <"$scratch/development") development dependencies, and no file outside of /app"

# Starts private stores and writes a code, and the environment of a production service. Ends with SIGTERM.
cat >"$scratch/stores.mjs" <<'END'
import { renameSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
const [root, folder] = process.argv.slice(2)
const { EmbeddedStores, freePort } = await import(`${root}/dev/embedded-stores.ts`)
const { Redis } = createRequire(`${root}/package.json`)('ioredis')
const stores = await EmbeddedStores.prepare(`${folder}/stores`)
process.on('SIGTERM', async () => {
  await stores.stop()
  process.exit(0)
})
await stores.start()
const redis = new Redis(stores.redisUrl)
await redis.set('sms_code_13812345678', '123456', 'EX', 600)
redis.disconnect()
const variables = { ...stores.environment({}), PORT: await freePort(), TRUST_PROXY: 'none', SMS: 'off' }
const lines = Object.entries(variables).map(([name, value]) => `${name}=${value}\n`)
writeFileSync(`${folder}/env.new`, lines.join(''))
renameSync(`${folder}/env.new`, `${folder}/env`)
END
node --import tsx/esm "$scratch/stores.mjs" "$PWD" "$scratch" >>"$log" 2>&1 </dev/null &
stores=$!
until [ -e "$scratch/env" ]; do
  kill -0 "$stores" 2>/dev/null || fail 'the private stores did not start'
  sleep 0.1
done
url=http://127.0.0.1:$(sed -n 's/^PORT=//p' "$scratch/env")

start_service() { container=$(podman run --detach "${run_options[@]}" --env-file "$scratch/env" "$image" 2>>"$log"); }
process_id() { podman inspect --format '{{.State.Pid}}' "$container"; }

# terminate WHEN: sends SIGTERM. The service must exit with code 0 within 5 s.
terminate() {
  local code seconds start
  start=$(now)
  podman kill --signal TERM "$container" >>"$log"
  code=$(timeout 20 podman wait --interval 50ms "$container") || fail "SIGTERM $1: it still runs after 20 s"
  seconds=$(seconds_since "$start")
  [ "$code" = 0 ] || fail "SIGTERM $1: exit code $code after $seconds s"
  is_below "$seconds" 5 || fail "SIGTERM $1: exit after $seconds s"
  step "SIGTERM $1: exit code 0 after $seconds s"
}

start=$(now)
start_service || fail 'the container does not start'
until curl -fs -o "$scratch/reply" "$url/health/ready"; do
  [ "$(process_id)" != 0 ] || fail 'the service ended'
  is_below "$(seconds_since "$start")" 60 || fail 'the service is not ready after 60 s'
  sleep 0.05
done
step "start: ready after $(seconds_since "$start") s, migrations of an empty database included"

# As the container sees it. A machine may map its users to others.
for file in cmdline status mounts; do podman exec "$container" cat "/proc/1/$file" >"$scratch/$file"; done
[ "$(tr '\0' ' ' <"$scratch/cmdline")" = 'node dist/server.js ' ] || fail 'process 1 is not node'
status_of() { awk -v name="$1:" '$1 == name { print $2 }' "$scratch/status"; }
[ "$(status_of Uid)" = 1000 ] || fail "it runs with the uid $(status_of Uid), not as the user node"
[ "$((16#$(status_of CapPrm) | 16#$(status_of CapBnd)))" = 0 ] || fail 'it has capabilities'
[ "$(status_of NoNewPrivs)" = 1 ] || fail 'it may gain privileges'
grep -qE '^[^ ]+ / [^ ]+ ro,' "$scratch/mounts" || fail 'its root is writable'
step 'runs as the user node on a read-only root, without capabilities'

password='a password of the check'
curl -s -i -o "$scratch/reply" -H 'Content-Type: application/json' "$url/api/v1.0/users" \
  -d "{\"mobile\":\"13812345678\",\"sms_code\":\"123456\",\"password\":\"$password\",\"password2\":\"$password\"}"
cat "$scratch/reply" >>"$log"
grep -q '^HTTP/1.1 201 ' "$scratch/reply" || fail 'the sign-up'
grep -qi '^set-cookie: __Host-sid=' "$scratch/reply" || fail 'the sign-up starts no session'
step 'signs up'

podman healthcheck run "$container" >>"$log" 2>&1 || fail 'HEALTHCHECK fails while the service answers'
process=$(process_id)
kill -STOP "$process"
start=$(now)
! timeout 20 podman healthcheck run "$container" >>"$log" 2>&1 || fail 'HEALTHCHECK passes while the service is stopped'
seconds=$(seconds_since "$start")
kill -CONT "$process"
is_below "$seconds" 10 || fail "the HEALTHCHECK of a stopped service does not end by itself"
step "HEALTHCHECK passes, and fails after $seconds s if the service hangs"

terminate 'while it serves'

! timeout 60 podman run --rm "${run_options[@]}" --env NODE_ENV=development "$image" >"$scratch/reply" 2>&1 ||
  fail 'it starts without stores'
cat "$scratch/reply" >>"$log"
grep -o 'DATABASE_URL, REDIS_URL: unset.*' "$scratch/reply" >"$scratch/message" ||
  fail 'it does not say that the store URLs are absent'
step "without store URLs: $(cat "$scratch/message")"

# As process 1, Node.js ignores SIGTERM until the service handles it, which must be the first thing that it does. A start takes
# about a second of CPU time, and the handler stands after less than a tenth of it.
start_service || fail 'the container does not start again'
cpu_ms() {
  awk -v ticks="$(getconf CLK_TCK)" '{ sub(/.*\) /, ""); print int(($12 + $13) * 1000 / ticks) }' "/proc/$(process_id)/stat"
}
until [ "$(cpu_ms)" -ge 200 ]; do
  [ "$(process_id)" != 0 ] || fail 'the service ended during its start'
  sleep 0.02
done
! curl -fs -m 1 -o "$scratch/reply" "$url/health/ready" || step 'the start is over before SIGTERM'
terminate 'during the start'

step 'all promises hold'
