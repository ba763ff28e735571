#!/usr/bin/env node
/* The command of the package. server.ts must be the first module that it loads, because it handles the signals. */

const usage = `usage:
  mobile-signup             starts the service
      Needs DATABASE_URL and REDIS_URL; with NODE_ENV=production also SESSION_SECRET, TRUST_PROXY
      and SMS_WEBHOOK_URL (or SMS=off).
  mobile-signup migrate     applies the pending migrations, and exits
      Needs DATABASE_URL.
  mobile-signup import FILE [--dry-run]
      Adds the users of another system: a CSV with a header (.csv), or JSON lines. Needs DATABASE_URL.
  mobile-signup --help      prints this text
docs/operating.md describes all variables.
`

const commands = new Map<string | undefined, () => Promise<unknown>>([
  [undefined, () => import('./server.js')],
  ['migrate', () => import('./migrate.js')],
  ['import', () => import('./import.js')]
])

const [name, ...args] = process.argv.slice(2)
const run = commands.get(name)
// Only the import has arguments, and it needs one.
const hasItsArguments = args.length > 0 === (name === 'import')
if (process.argv.includes('--help')) process.stdout.write(usage)
else if (run && hasItsArguments) await run()
else {
  process.stderr.write(usage)
  process.exitCode = 1
}
