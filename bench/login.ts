import { availableParallelism } from 'node:os'
import { hash } from '@node-rs/argon2'
import { bareHashes } from './bare-hashes.js'
import type { Lab, Subject } from './lab.js'
import { closedLoop, issueSignUps, mobileOf } from './load.js'
import { progress, type Row } from './report.js'
import { median, round } from './statistics.js'

const password = 'a bench password'
const users = 4_000
const alternations = 200

/** Logins, as near to bare hashes as sign-ups are; and that no time tells who is registered. */
export async function login(lab: Lab): Promise<Row[]> {
  const threads = availableParallelism()
  const [rounds, seconds] = [5, 3]
  const service = await lab.service({
    SMS_RESEND_S: '0',
    SMS_DAILY_MAX: '0',
    SMS_IP_HOURLY_MAX: '0',
    SMS_PREFIX_HOURLY_MAX: '0'
  })
  const registered = (await issueSignUps(lab.redis, users)).map(mobileOf)
  await lab.postgres.query(
    'INSERT INTO users (name, mobile, password_hash) SELECT m, m, $2 FROM unnest($1::text[]) m',
    [registered, await hash(password)]
  )
  const bodies = registered.map((mobile) => JSON.stringify({ mobile, password }))
  await closedLoop(service, { connections: 32, seconds: 2, bodies, path: '/api/v1.0/sessions' })

  const pairs = []
  for (let n = 0; n < rounds; n++) {
    progress(`login: round ${n + 1} of ${rounds}`)
    const bare = await bareHashes({ threads, seconds })
    const logins = await closedLoop(service, { connections: 32, seconds, bodies, path: '/api/v1.0/sessions' })
    const failed = logins.replies.filter(({ status }) => status !== 201).length
    if (failed > 0) throw new Error(`${failed} logins failed`)
    pairs.push([logins.perSecond, bare.perSecond] as const)
  }

  const unregistered = (await issueSignUps(lab.redis, alternations)).map(mobileOf)
  const asked = [registered.slice(0, alternations), unregistered] as const
  progress(`login: ${alternations} times a registered and an unregistered mobile`)
  const codes = await alternate(service, '/sms_codes', asked, (mobile) => ({ mobile }))
  const guesses = await alternate(service, '/sessions', asked, (mobile) => ({ mobile, password: 'a wrong password' }))
  await service.stop()
  return [
    {
      name: 'logins/s ÷ bare hashes/s, 32 connections',
      figure: median(pairs.map(([ours, theirs]) => ours / theirs)),
      target: { atLeast: 0.9 },
      raw: pairs.map((pair) => pair.map(round))
    },
    timing('a code sent: the slower median of registered and not ÷ the other', codes),
    timing('a login refused: the slower median of registered and not ÷ the other', guesses)
  ]
}

type Times = readonly [registeredMs: number, unregisteredMs: number]

function timing(name: string, times: Times): Row {
  return { name, figure: Math.max(...times) / Math.min(...times), target: { atMost: 1.1 }, raw: times.map(round) }
}

/** The median times of requests that differ in who they name, sent in turn. */
async function alternate(
  { url }: Subject,
  path: string,
  mobiles: readonly [readonly string[], readonly string[]],
  bodyOf: (mobile: string) => object
): Promise<Times> {
  const times: [number[], number[]] = [[], []]
  for (let n = 0; n < alternations; n++) {
    for (const side of [0, 1] as const) {
      const body = JSON.stringify(bodyOf(mobiles[side][n] ?? ''))
      const startedAt = performance.now()
      const reply = await fetch(`${url}/api/v1.0${path}`, {
        method: 'POST',
        headers: { 'content-type': 'application/json' },
        body
      })
      await reply.text()
      times[side].push(performance.now() - startedAt)
    }
  }
  return [median(times[0]), median(times[1])]
}
