import { readFile, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { hash } from '@node-rs/argon2'
import type { FastifyInstance } from 'fastify'
import type { Environment } from '../../dist/config/config.js'
import { copyBuild } from '../../testkit/built-copy.js'
import type { PrivateStores } from '../../testkit/private-stores.js'
import { patient } from '../../testkit/testbed.js'
import { Requests } from './requests.js'
import type { Scenario } from './scenarios.js'

/** Longer than any lease, shorter than the window of a guess budget. */
const passSeconds = 600

const offsetKey = 'interleavings:offset'

/** A change of the built service: in a file of dist, a text is replaced by another. */
export interface Patch {
  file: string
  text: string
  replacement: string
}

/** The scripts run as they are, but the test owns their clock. */
const ownClock: Patch = {
  file: 'codes/scripts.js',
  text: `local time = redis.call('TIME')\n`,
  replacement: `local time = redis.call('TIME')\ntime[1] = time[1] + (redis.call('GET', '${offsetKey}') or 0)\n`
}

/** The service on real stores, whose requests go step by step. */
export interface System {
  app: FastifyInstance
  requests: Requests
  stores: PrivateStores
  clock: { reset(): Promise<unknown>; pass(): Promise<unknown> }
  /** Adds a user with a password that no client has. */
  register(mobile: string): Promise<void>
  close(): Promise<void>
}

/** Builds the service from a copy of dist, with the clock and further patches. */
async function buildSystem(stores: PrivateStores, patches: readonly Patch[], env: Environment): Promise<System> {
  const copy = await copyBuild()
  for (const { file, text, replacement } of [ownClock, ...patches]) {
    const path = join(copy, 'dist', file)
    const source = await readFile(path, 'utf8')
    if (!source.includes(text)) throw new Error(`${file} does not contain ${text}`)
    await writeFile(path, source.replaceAll(text, replacement))
  }
  const { buildApp }: typeof import('../../dist/app.js') = await import(join(copy, 'dist/app.js'))
  const { loadConfig }: typeof import('../../dist/config/config.js') = await import(join(copy, 'dist/config/config.js'))
  const { StoreUnavailable }: typeof import('../../dist/stores/store-unavailable.js') = await import(
    join(copy, 'dist/stores/store-unavailable.js')
  )
  const config = loadConfig({
    ...stores.environment,
    HASH_MEMORY_KIB: '8',
    HASH_PASSES: '1',
    HASH_THREADS: '1',
    DOCS: 'false',
    ...patient,
    ...env
  })
  const app = await buildApp(config, { logStream: { write: () => undefined } })
  const formerHash = await hash('a former password', { memoryCost: 8, timeCost: 1 })
  return {
    app,
    requests: new Requests(app, () => new StoreUnavailable('redis', new Error('Command timed out'))),
    stores,
    clock: {
      reset: () => stores.redis.del(offsetKey),
      pass: () => stores.redis.incrby(offsetKey, passSeconds)
    },
    async register(mobile) {
      const values = [mobile, formerHash]
      await stores.postgres.query('INSERT INTO users (name, mobile, password_hash) VALUES ($1, $1, $2)', values)
    },
    async close() {
      await app.close()
      await rm(copy, { recursive: true })
    }
  }
}

/** Builds a system with some patches for each number of guesses. Scenarios with the same number share it. */
export class Systems {
  private readonly systems = new Map<number | undefined, Promise<System>>()

  constructor(
    private readonly stores: PrivateStores,
    private readonly patches: readonly Patch[]
  ) {}

  get({ guesses }: Scenario): Promise<System> {
    const env = guesses === undefined ? {} : { SMS_CODE_ATTEMPTS: `${guesses}` }
    const system = this.systems.get(guesses) ?? buildSystem(this.stores, this.patches, env)
    this.systems.set(guesses, system)
    return system
  }

  async close(): Promise<void> {
    for (const system of this.systems.values()) await (await system).close()
  }
}
