import type { FastifyInstance } from 'fastify'
import { buildApp } from '#src/app.js'
import * as scripts from '#src/codes/scripts.js'
import { loadConfig } from '#src/config/config.js'
import type { PrivateStores } from '../../testkit/private-stores.js'
import { patient, wideGuessLimits } from '../../testkit/testbed.js'
import { cheapHash, Requests } from './requests.js'
import type { Scenario } from './scenarios.js'

/** A change of a Lua script: a text is replaced by another. */
export type LuaChange = readonly [script: 'holdCode' | 'releaseCode', text: string, replacement: string]

/** Longer than any lease. Six of them are shorter than the window of a guess budget. */
const passSeconds = 600

const offsetKey = 'interleavings:offset'

/** The test owns the clock of the leases. No other script of a sign-up or a reset compares the times of two requests. */
const ownClock: LuaChange = [
  'holdCode',
  `local time = redis.call('TIME')`,
  `local time = redis.call('TIME') time[1] = time[1] + (redis.call('GET', '${offsetKey}') or 0)`
]

export type System = Awaited<ReturnType<typeof startSystem>>

/** Starts the service on real stores. Its requests go step by step. */
export async function startSystem(stores: PrivateStores, { guesses }: Scenario, bug?: LuaChange) {
  const { redis, postgres, environment } = stores
  const guessLimit = guesses === undefined ? {} : { SMS_CODE_ATTEMPTS: `${guesses}` }
  const limits = { ...patient, ...wideGuessLimits, ...guessLimit }
  const config = loadConfig({ ...environment, ...limits, HASH_THREADS: '1', DOCS: 'false' })
  const app = await buildApp(config, { logStream: { write: () => undefined } })
  redefineScripts(app, bug ? [ownClock, bug] : [ownClock])
  const insert = 'INSERT INTO users (name, mobile, password_hash) VALUES ($1, $1, $2)'
  return {
    app,
    requests: new Requests(app, await app.mobileSignup.redis.run((client) => Promise.resolve(client))),
    stores,
    resetClock: () => redis.del(offsetKey),
    passLease: () => redis.incrby(offsetKey, passSeconds),
    /** Adds a user with a password that no client has. */
    register: (mobile: string) => postgres.query(insert, [mobile, cheapHash('a former password')])
  }
}

function redefineScripts(app: FastifyInstance, changes: readonly LuaChange[]): void {
  const lua = { holdCode: scripts.holdCode, releaseCode: scripts.releaseCode }
  for (const [script, text, replacement] of changes) {
    if (!lua[script].includes(text)) throw new Error(`the script ${script} does not contain ${text}`)
    lua[script] = lua[script].replace(text, () => replacement)
  }
  app.mobileSignup.redis.defineScripts({
    holdCode: { lua: lua.holdCode },
    releaseCode: { lua: lua.releaseCode }
  })
}
