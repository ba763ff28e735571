#!/bin/sh
# Stryker changes a copy of the project. This builds the copy, because the tests import its dist.
# With the argument `threads`, the hash threads have the environment of the process: it says which mutant is active.
set -eu
tsc -p tsconfig.build.json --noCheck --declaration false
if [ "${1:-}" = threads ]; then sed -i 's/env: {}/env: process.env/' dist/passwords/hash-pool.js; fi
