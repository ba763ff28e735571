/*
 * npm run chaos: two instances, clients that retry, and at random the death of an instance, restarts of Postgres, cut
 * connections and stalls; then every promise to every client is compared with what is in Postgres.
 *
 * CHAOS_SECONDS (60), CHAOS_SEED (a random one, printed). Exits with 1 if anything was lost, done twice or made up.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { randomInt } from 'node:crypto'
import { once } from 'node:events'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { verify } from '@node-rs/argon2'
import { Redis } from 'ioredis'
import pg from 'pg'
import { EmbeddedStores } from '../src/dev/stores.js'
import { migrate } from '../src/stores/migrations.js'
import { FaultProxy } from './fault-proxy.js'

const seconds = Number(process.env.CHAOS_SECONDS || 60)
const seed = Number(process.env.CHAOS_SEED || randomInt(2 ** 31))
const clientsAtOnce = 24

/** How long a client may still need when the faults have ended: leases, restarts and reconnections included. */
const patienceMs = 20_000

const random = mulberry32(seed)
const between = (min: number, max: number) => min + random() * (max - min)
const oneOf = <T>(...values: [T, ...T[]]): T => values[Math.floor(random() * values.length)] ?? values[0]

/** Numbers in [0, 1) that a seed decides. */
function mulberry32(state: number): () => number {
  let a = state
  return () => {
    a = (a + 0x6d2b79f5) | 0
    let n = Math.imul(a ^ (a >>> 15), 1 | a)
    n = (n + Math.imul(n ^ (n >>> 7), 61 | n)) ^ n
    return ((n ^ (n >>> 14)) >>> 0) / 2 ** 32
  }
}

/** An instance of the built service, started again when it dies. */
class Instance {
  url: string | undefined
  private process: ChildProcess | undefined
  private failedStarts = 0

  constructor(private readonly env: Record<string, string>) {
    // Where this program throws before its end.
    process.once('exit', () => this.process?.kill('SIGKILL'))
  }

  async start(): Promise<void> {
    const child = spawn(process.execPath, [fileURLToPath(new URL('../dist/server.js', import.meta.url))], {
      env: { PATH: process.env.PATH, ...this.env },
      stdio: ['ignore', 'pipe', 'inherit']
    })
    this.process = child
    let log = ''
    child.stdout.on('data', (chunk) => {
      // A child that was killed may still have something to say.
      if (this.process !== child) return
      log = `${log}${chunk}`.slice(-10_000)
      this.url ??= /Server listening at (http:[^"]+)/.exec(log)?.[1]
    })
    while (this.url === undefined) {
      if (child.exitCode !== null) {
        // A store may have been away for longer than a start waits.
        if (++this.failedStarts > 3) throw new Error(`an instance does not start: ${log}`)
        return this.start()
      }
      await sleep(20)
    }
  }

  async kill(): Promise<void> {
    if (this.process === undefined) return
    const exit = once(this.process, 'exit')
    this.url = undefined
    this.process.kill('SIGKILL')
    await exit
  }

  /** Neither dead nor alive for a while: its leases end, and it goes on. */
  async pause(ms: number): Promise<void> {
    this.process?.kill('SIGSTOP')
    await sleep(ms)
    this.process?.kill('SIGCONT')
  }

  /** @returns the exit code after SIGTERM */
  async stop(): Promise<number | null> {
    if (this.process === undefined) return null
    const exit = once(this.process, 'exit')
    this.process.kill('SIGTERM')
    return (await exit)[0]
  }
}

/** A person with one code, who asks until they are told success. */
interface Client {
  mobile: string
  code: string
  password: string
  /** What they were told, request by request. */
  answers: string[]
  userId?: string
}

const counts: Record<string, number> = {}
const count = (what: string) => {
  counts[what] = (counts[what] ?? 0) + 1
}
const violations: string[] = []
const violate = ({ mobile, answers }: Client, what: string) =>
  violations.push(`${what}: client ${mobile.slice(-6)}, told ${answers.join(', ')}`)

process.stdout.write(`chaos: ${seconds} s, CHAOS_SEED=${seed}\n`)
const directory = await mkdtemp(join(tmpdir(), 'mobile-signup-chaos-'))
const stores = await EmbeddedStores.prepare(directory)
await stores.start()
await migrate(stores.databaseUrl)
const redis = new Redis(stores.redisUrl)
const [redisProxy, postgresProxy] = [await FaultProxy.open(stores.redisUrl), await FaultProxy.open(stores.databaseUrl)]
const env = {
  PORT: '0',
  REDIS_URL: redisProxy.url,
  DATABASE_URL: postgresProxy.url,
  SESSION_SECRET: 'a secret of at least thirty-two characters',
  HASH_MEMORY_KIB: '4096',
  HASH_PASSES: '1',
  HASH_MAX_WAIT_MS: '500',
  STORE_TIMEOUT_MS: '300',
  MIGRATE: 'false'
}
const instances: [Instance, Instance] = [new Instance(env), new Instance(env)]
await Promise.all(instances.map((instance) => instance.start()))

const clients: Client[] = []
const faultsEndAt = Date.now() + seconds * 1_000
const deadline = faultsEndAt + patienceMs

await Promise.all([faults(), ...Array.from({ length: clientsAtOnce }, () => signUpInTurn())])
const exits = await Promise.all(instances.map((instance) => instance.stop()))
if (exits.some((code) => code !== 0)) violations.push(`SIGTERM: exit codes ${exits}`)
await reconcile()

redis.disconnect()
await Promise.all([redisProxy.close(), postgresProxy.close()])
await stores.stop()
await rm(directory, { recursive: true })
for (const [what, n] of Object.entries(counts).sort()) process.stdout.write(`${String(n).padStart(7)}  ${what}\n`)
for (const violation of violations.slice(0, 20)) process.stdout.write(`VIOLATION ${violation}\n`)
process.stdout.write(`chaos: ${clients.length} clients, ${violations.length} violations, CHAOS_SEED=${seed}\n`)
process.exit(violations.length > 0 ? 1 : 0)

async function faults(): Promise<void> {
  while (Date.now() < faultsEndAt) {
    await sleep(between(200, 1_500))
    const proxy = oneOf(redisProxy, postgresProxy)
    const store = proxy === redisProxy ? 'Redis' : 'Postgres'
    switch (oneOf('kill', 'kill', 'pause', 'restart', 'cut', 'cut', 'stall')) {
      case 'kill': {
        const instance = oneOf(...instances)
        await instance.kill()
        count('instances killed')
        await sleep(between(0, 500))
        await instance.start()
        break
      }
      case 'pause':
        await oneOf(...instances).pause(between(500, 3_000))
        count('instances paused')
        break
      case 'restart': {
        const mode = oneOf('fast', 'immediate')
        await stores.restartPostgres(mode)
        count(`restarts of Postgres, ${mode}`)
        break
      }
      case 'cut':
        await proxy.apply('reset')
        count(`times all connections to ${store} were cut`)
        break
      case 'stall':
        await proxy.apply('stall')
        await sleep(between(100, 1_500))
        await proxy.heal()
        count(`stalls of ${store}`)
    }
  }
}

async function signUpInTurn(): Promise<void> {
  while (Date.now() < faultsEndAt) {
    const client: Client = {
      mobile: `${13_000_000_000 + clients.length}`,
      code: `${Math.floor(between(100_000, 999_999))}`,
      password: `a password of ${clients.length}`,
      answers: []
    }
    clients.push(client)
    await redis.set(`sms_code_${client.mobile}`, client.code, 'EX', 600)
    await signUp(client)
  }
}

/** Asks until success, or until it is clear that there will be none. */
async function signUp(client: Client): Promise<void> {
  while (Date.now() < deadline) {
    const { status, userId, replayed } = await ask(client)
    count(`answers ${status}${replayed ? ', replayed' : ''}`)
    client.answers.push(status)
    if (userId !== undefined) {
      if (client.userId !== undefined && client.userId !== userId) return void violate(client, 'two user_ids')
      client.userId = userId
      // Some ask once more, as a gateway does whose own client has gone.
      if (client.answers.length > 1 || random() < 0.9) return
    } else if (status.startsWith('4')) {
      return void violate(client, 'refused with a code that had signed nobody up')
    }
    await sleep(between(10, 200))
  }
  if (client.userId === undefined) violate(client, 'never signed up')
}

async function ask({ mobile, code, password }: Client) {
  const url = oneOf(...instances).url
  if (url === undefined) return { status: 'no instance' }
  try {
    const reply = await fetch(`${url}/api/v1.0/users`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ mobile, sms_code: code, password, password2: password }),
      // One in ten has no patience.
      signal: AbortSignal.timeout(random() < 0.1 ? between(1, 60) : 10_000)
    })
    const { errno, data } = (await reply.json()) as { errno: string; data?: { user_id: string } }
    const replayed = reply.headers.get('idempotent-replayed') === 'true'
    return { status: errno === '0' ? '201' : `${reply.status} ${errno}`, userId: data?.user_id, replayed }
  } catch {
    return { status: 'none' }
  }
}

/** Each promise against the rows. */
async function reconcile(): Promise<void> {
  const postgres = new pg.Client(stores.databaseUrl)
  await postgres.connect()
  const { rows } = await postgres.query<{ id: string; mobile: string; password_hash: string }>('SELECT * FROM users')
  await postgres.end()
  const rowOf = new Map(rows.map((row) => [row.mobile, row]))
  if (rowOf.size < rows.length) violations.push('several rows of one mobile')
  for (const client of clients) {
    const row = rowOf.get(client.mobile)
    rowOf.delete(client.mobile)
    if (row === undefined) violate(client, 'no row')
    else if (row.id !== client.userId) violate(client, 'the row has another id')
    else if (!(await verify(row.password_hash, client.password))) violate(client, 'the password does not log in')
    else count('clients told 201 whose row has their id and their password')
  }
  for (const mobile of rowOf.keys()) violations.push(`a row that nobody asked for: ${mobile.slice(-6)}`)
}
