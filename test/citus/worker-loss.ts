import { setTimeout as sleep } from 'node:timers/promises'
import { warmUp } from '../../bench/load.js'
import { issueSignUps, mobileOf } from '../../bench/request-bodies.js'
import { percentile } from '../../bench/statistics.js'
import { client } from '../../testkit/client.js'
import type { PrivateStores } from '../../testkit/private-stores.js'
import { type Check, check, print } from './checks.js'
import type { Node } from './cluster.js'
import { startService } from './service.js'

const perSecond = 50
const seconds = 10

/** When the worker is lost, and how long it stays away. */
const lossAtMs = 2_000
const lossMs = 4_000

/** How long a client repeats its request after a 503. */
const patienceMs = 60_000

/** A client that signs up once, and repeats its request after a 503. */
interface Person {
  mobile: string
  /** In milliseconds from the first request of all. */
  startedAtMs: number
  /** The status and errno of each reply. */
  replies: string[]
  /** The time to the first reply. */
  firstMs: number
  /** The id in the 201. */
  userId?: string
}

interface WorkerLoss {
  coordinator: Node
  lostWorker: Node
  stores: PrivateStores
  /** SIGKILL for a machine that crashes and starts again, SIGSTOP for one that hangs. */
  signal: 'SIGKILL' | 'SIGSTOP'
}

/** Lets people sign up at a constant rate, loses a worker meanwhile, and compares all replies with the rows. */
export async function loseWorker({ coordinator, lostWorker, stores, signal }: WorkerLoss): Promise<Check[]> {
  print(`\n${signal} to a worker for ${lossMs / 1_000} s, at ${perSecond} sign-ups/s through ${coordinator.name}`)
  const service = await startService(coordinator, stores)
  try {
    await warmUp(service, stores.redis)
    await coordinator.query('TRUNCATE users')
    const bodies = await issueSignUps(stores.redis, perSecond * seconds)
    // The worker is back before the last client gives up.
    const [people] = await Promise.all([signUpAll(service.url, bodies), interruptNode(lostWorker, signal)])
    printReplies(people)
    return await compareWithRows(coordinator, people)
  } finally {
    await service.stop()
  }
}

async function interruptNode(node: Node, signal: WorkerLoss['signal']): Promise<void> {
  await sleep(lossAtMs)
  node.signal(signal)
  await sleep(lossMs)
  if (signal === 'SIGSTOP') node.signal('SIGCONT')
  else await node.start()
}

async function signUpAll(url: string, bodies: readonly string[]): Promise<Person[]> {
  const startedAt = performance.now()
  return Promise.all(
    bodies.map(async (body, index) => {
      const startedAtMs = (index * 1_000) / perSecond
      await sleep(startedAt + startedAtMs - performance.now())
      const person: Person = { mobile: mobileOf(body), startedAtMs, replies: [], firstMs: 0 }
      await signUp(url, body, person)
      return person
    })
  )
}

/** Sends the request, and repeats it after `Retry-After` while the reply is 503. */
async function signUp(url: string, body: string, person: Person): Promise<void> {
  const startedAt = performance.now()
  while (performance.now() - startedAt < patienceMs) {
    const reply = await client(url).signUp(body)
    const { errno, data } = reply.json()
    if (person.replies.length === 0) person.firstMs = performance.now() - startedAt
    person.replies.push(`${reply.statusCode} ${errno}`)
    if (data?.user_id !== undefined) person.userId = data.user_id
    if (reply.statusCode !== 503) return
    await sleep(Number(reply.headers['retry-after']) * 1_000)
  }
}

function printReplies(people: readonly Person[]): void {
  const lossEndMs = lossAtMs + lossMs
  const phases: [string, Person[]][] = [
    ['before', people.filter(({ startedAtMs }) => startedAtMs < lossAtMs)],
    ['during', people.filter(({ startedAtMs }) => startedAtMs >= lossAtMs && startedAtMs < lossEndMs)],
    ['after', people.filter(({ startedAtMs }) => startedAtMs >= lossEndMs)]
  ]
  for (const [phase, group] of phases) {
    const times = group.filter(({ replies }) => replies[0]?.startsWith('201')).map(({ firstMs }) => firstMs)
    const [p50, p99] = [percentile(times, 0.5), percentile(times, 0.99)].map((ms) => `${Math.round(ms)} ms`)
    const counts = countEach(group.map(({ replies }) => replies[0] ?? 'none'))
    print(`  first replies ${phase}: ${counts}; those of 201: p50 ${p50}, p99 ${p99}`)
  }
  const retries = people.filter(({ replies }) => replies.length > 1)
  print(`  replies to all retries: ${countEach(retries.flatMap(({ replies }) => replies.slice(1)))}`)
  print(`  most replies to one client: ${Math.max(...people.map(({ replies }) => replies.length))}`)
}

function countEach(values: readonly string[]): string {
  const counts = new Map<string, number>()
  for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1)
  return [...counts].map(([value, count]) => `${count} × ${value}`).join(', ') || 'none'
}

async function compareWithRows(coordinator: Node, people: readonly Person[]): Promise<Check[]> {
  const rows = await coordinator.query<{ mobile: string; id: string }>('SELECT mobile, id FROM users')
  const ids = new Map(rows.map(({ mobile, id }) => [mobile, id]))
  const succeeded = people.filter(({ userId }) => userId !== undefined)
  const refused = people.filter(({ replies }) => replies[0] !== '201 0')
  const refusals = new Set(people.flatMap(({ replies }) => replies).filter((reply) => !reply.startsWith('201')))
  return [
    check(
      `all ${refused.length} of ${people.length} that were refused succeeded later`,
      succeeded.length === people.length
    ),
    check(
      `the ${succeeded.length} replies of 201 are the ${rows.length} rows, with their ids`,
      rows.length === succeeded.length && succeeded.every(({ mobile, userId }) => ids.get(mobile) === userId)
    ),
    check('no two rows have one id', new Set(ids.values()).size === rows.length),
    check(
      `every other reply was 503: ${[...refusals].join(', ')}`,
      [...refusals].every((reply) => reply.startsWith('503'))
    )
  ]
}
