import { setTimeout as sleep } from 'node:timers/promises'
import type { Redis } from 'ioredis'
import { client } from '../../testkit/client.js'
import type { Report } from './report.js'
import type { SeededRandom } from './seeded-random.js'
import type { ServiceInstance } from './service-instance.js'

/** How long a person may still need when the faults have ended: for leases, restarts and reconnections, also on a busy machine. */
const patienceMs = 60_000

/** How many sign up at the same time. */
const concurrency = 24

/** A person with one code. */
export interface Person {
  mobile: string
  code: string
  password: string
  /** What each of their requests was answered. */
  answers: string[]
  /** The ids in their answers. There are several only if Postgres has lost a row. */
  userIds: string[]
}

export interface PeopleOptions {
  instances: [ServiceInstance, ...ServiceInstance[]]
  redis: Redis
  random: SeededRandom
  report: Report
  /** When the last person begins. */
  until: number
  /** Whether Postgres may lose rows that have been answered. */
  mayLoseRows: boolean
}

/** Lets people sign up. Each of them repeats the same request until it succeeds. @returns all of them */
export async function signUpPeople(options: PeopleOptions): Promise<Person[]> {
  const { redis, random, until } = options
  const people: Person[] = []

  async function signUpInTurn(): Promise<void> {
    while (Date.now() < until) {
      const mobile = `${13_000_000_000 + people.length}`
      const code = `${Math.floor(random.between(100_000, 999_999))}`
      const person = { mobile, code, password: `a password of ${mobile}`, answers: [], userIds: [] }
      people.push(person)
      await redis.set(`sms_code_${mobile}`, code, 'EX', 600)
      await signUp(person, options)
    }
  }
  await Promise.all(Array.from({ length: concurrency }, signUpInTurn))
  return people
}

/** Repeats the request until it succeeds, or until a promise is broken. */
export async function signUp(person: Person, options: PeopleOptions): Promise<void> {
  const { random, report, until, mayLoseRows } = options
  while (Date.now() < until + patienceMs) {
    const { answer, userId, isReplay = false } = await sendSignUp(person, options)
    report.count(`answers ${answer}${isReplay ? ', replayed' : ''}`)
    person.answers.push(answer)
    if (userId !== undefined) {
      if (!person.userIds.includes(userId)) person.userIds.push(userId)
      if (person.userIds.length > 1 && !mayLoseRows) return report.violate(about(person, 'two user_ids'))
      // Some repeat a request that has succeeded, as a gateway does whose own client has disconnected.
      if (person.answers.length > 1 || random.next() < 0.9) return
    } else if (answer.startsWith('4')) {
      return report.violate(about(person, 'refused, although the code had not been used'))
    }
    await sleep(random.between(10, 200))
  }
  if (person.userIds.length === 0) report.violate(about(person, 'never signed up'))
}

async function sendSignUp(
  { mobile, code, password }: Person,
  { instances, random }: PeopleOptions
): Promise<{ answer: string; userId?: string; isReplay?: boolean }> {
  const { url } = random.oneOf(...instances)
  if (url === undefined) return { answer: 'no instance' }
  // One in ten disconnects early.
  const timeoutMs = random.next() < 0.1 ? Math.ceil(random.between(1, 60)) : 10_000
  try {
    const body = { mobile, sms_code: code, password, password2: password }
    const reply = await client(url).signUp(body, { signal: AbortSignal.timeout(timeoutMs) })
    const { errno, data } = reply.json()
    if (errno !== '0') return { answer: `${reply.statusCode} ${errno}` }
    const isReplay = reply.headers['idempotent-replayed'] === 'true'
    return { answer: `${reply.statusCode}`, userId: data.user_id, isReplay }
  } catch {
    return { answer: 'none' }
  }
}

/** Describes the violation of a promise to a person. */
export const about = ({ mobile, answers }: Person, violation: string) =>
  `${violation}: client ${mobile.slice(-6)}, last answers ${answers.slice(-20).join(', ')}`
