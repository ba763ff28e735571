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

/** What a person asks for with a code. */
type Operation = 'signUp' | 'resetPassword' | 'deleteAccount'

export interface Person {
  mobile: string
  /** Of the present request, and of its repeats. */
  code: string
  /** The last one is the present one. */
  passwords: [string, ...string[]]
  isDeleted: boolean
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
  /** Whether Postgres may lose changes that have been answered. */
  mayLoseRows: boolean
}

/** Lets people sign up, and some go on. Each of them repeats the same request until it succeeds. @returns all of them */
export async function signUpPeople(options: PeopleOptions): Promise<Person[]> {
  const { random, until } = options
  const people: Person[] = []

  async function liveInTurn(): Promise<void> {
    while (Date.now() < until) {
      const mobile = `${13_000_000_000 + people.length}`
      const person: Person = {
        mobile,
        code: '',
        passwords: [`a password of ${mobile}`],
        isDeleted: false,
        answers: [],
        userIds: []
      }
      people.push(person)
      await askFor('signUp', person, options)
      if (random.next() < 0.3) {
        person.passwords.push(`another password of ${mobile}`)
        await askFor('resetPassword', person, options)
      }
      if (random.next() < 0.3) {
        person.isDeleted = true
        await askFor('deleteAccount', person, options)
      }
    }
  }
  await Promise.all(Array.from({ length: concurrency }, liveInTurn))
  return people
}

/** Gives a person a new code, and sends the request until it succeeds. */
export async function askFor(operation: Operation, person: Person, options: PeopleOptions): Promise<void> {
  person.code = `${Math.floor(options.random.between(100_000, 999_999))}`
  await options.redis.set(`sms_code_${person.mobile}`, person.code, 'EX', 600)
  await repeat(operation, person, options)
}

/** Repeats the request until it succeeds, or until a promise is broken. */
export async function repeat(operation: Operation, person: Person, options: PeopleOptions): Promise<void> {
  const { random, report, until, mayLoseRows } = options
  let hasSucceeded = false
  for (let attempt = 1; Date.now() < until + patienceMs; attempt++) {
    const { answer, userId, isReplay = false } = await send(operation, person, options)
    report.count(`answers to ${operation}: ${answer}${isReplay ? ', replayed' : ''}`)
    person.answers.push(`${operation} ${answer}`)
    if (answer.startsWith('2')) {
      hasSucceeded = true
      if (userId !== undefined && !person.userIds.includes(userId)) person.userIds.push(userId)
      if (person.userIds.length > 1 && !mayLoseRows) return report.violate(about(person, 'two user_ids'))
      // Some repeat a request that has succeeded, as a gateway does whose own client has disconnected.
      if (attempt > 1 || random.next() < 0.9) return
    } else if (answer.startsWith('4')) {
      // The row, or the new password, may be lost.
      if (operation === 'resetPassword' && mayLoseRows) return
      return report.violate(about(person, 'refused, although the code had not been used'))
    }
    await sleep(random.between(10, 200))
  }
  if (!hasSucceeded) report.violate(about(person, `${operation} never succeeded`))
}

async function send(
  operation: Operation,
  { mobile, code, passwords }: Person,
  { instances, random }: PeopleOptions
): Promise<{ answer: string; userId?: string; isReplay?: boolean }> {
  const { url } = random.oneOf(...instances)
  if (url === undefined) return { answer: 'no instance' }
  // One in ten disconnects early.
  const timeoutMs = random.next() < 0.1 ? Math.ceil(random.between(1, 60)) : 10_000
  try {
    const password = passwords.at(-1)
    const body = { mobile, sms_code: code, password, password2: password }
    const reply = await client(url)[operation](body, { signal: AbortSignal.timeout(timeoutMs) })
    const { errno, data } = reply.json()
    if (errno !== '0') return { answer: `${reply.statusCode} ${errno}` }
    const isReplay = reply.headers['idempotent-replayed'] === 'true'
    return { answer: `${reply.statusCode}`, isReplay, ...(data && { userId: data.user_id }) }
  } catch {
    return { answer: 'none' }
  }
}

/** Describes the violation of a promise to a person. */
export const about = ({ mobile, answers }: Person, violation: string) =>
  `${violation}: client ${mobile.slice(-6)}, last answers ${answers.slice(-20).join(', ')}`
