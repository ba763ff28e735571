import { verify } from '@node-rs/argon2'
import type { Reply } from '../../testkit/client.js'
import { code, codeKey, type History, isSpent, send } from './history.js'
import type { System } from './system.js'

/** After two wrong passwords of replays, nobody can replay a code. */
const wrongReplaysMax = 2

const isSuccess = (reply: Reply) => reply.json().errno === '0'

/**
 * Compares the end of a run with the guarantees of docs/guarantees.md. After the lease, each client that has the code sends
 * its request once more.
 */
export async function findViolations(system: System, history: History): Promise<string[]> {
  const { stores, clock } = system
  const { clients, mobile, log } = history
  const violations: string[] = []
  const answers = clients.flatMap((client) => client.sent.flatMap(({ reply }) => (reply ? { client, reply } : [])))
  const successesIn = (some: typeof answers) => some.filter(({ reply }) => isSuccess(reply))

  const readRow = async () => {
    const { rows } = await stores.postgres.query('SELECT id, password_hash AS phc FROM users WHERE mobile = $1', [
      mobile
    ])
    if (rows.length > 1) violations.push(`G2: the mobile has ${rows.length} rows`)
    return rows[0]
  }

  for (const { client } of successesIn(answers)) {
    if (isSpent(history, client, history.claims.indexOf(client))) {
      violations.push(`G8: ${client.name} succeeds, although its guesses are spent`)
    }
  }

  const isBack = (await stores.redis.get(codeKey(mobile))) === code
  if (successesIn(answers).length > 0 && isBack) violations.push('G1: the code works again after a success')

  // Nobody waits any more. The lease of whoever died passes.
  await clock.pass()
  for (const client of clients.filter(({ hasCode }) => hasCode)) {
    const row = await readRow()
    const written = row && (await findPassword(row.phc, clients))
    const others = clients.filter(({ hasCode, password }) => hasCode && password !== client.password)
    // Also one that has died may have been counted.
    const dead = others.flatMap(({ sent }) => sent.filter(({ isDead }) => isDead))
    const refused = answers.filter(
      ({ client: other, reply: { statusCode } }) => others.includes(other) && [409, 422].includes(statusCode)
    )
    const reply = await send(system, history, client)
    log.push(`${client.name}: at the end, the answer is ${reply.statusCode} ${reply.json().errno}`)
    answers.push({ client, reply })
    if (history.isCodeGone || dead.length + refused.length >= wrongReplaysMax) continue
    if (isSpent(history, client)) continue
    if (written === undefined && !isSuccess(reply)) violations.push(`G4: ${client.name} has lost its code`)
    if (written === client.password && !isSuccess(reply)) violations.push(`G5: the retry of ${client.name} fails`)
    if (reply.statusCode >= 500) violations.push(`G4: ${client.name} is answered ${reply.statusCode} after the lease`)
  }

  const row = await readRow()
  const successes = successesIn(answers)
  const signUps = successes.filter(({ client }) => client.action === 'sign up')
  if (new Set(signUps.map(({ client }) => client.password)).size > 1) {
    violations.push('G1: one code has completed two sign-ups with different passwords')
  }
  // A later reset replaces the password, and ends the sessions, of an earlier one.
  const lasting = [...signUps, ...successes.filter(({ client }) => client.action === 'reset').slice(-1)]
  for (const { client, reply } of lasting) {
    const { user_id: userId, session } = reply.json().data
    if (!client.hasCode) violations.push(`G8: ${client.name} had a wrong code and succeeds`)
    if (row?.id !== userId) violations.push(`G3: ${client.name} got user ${userId}, but the row has ${row?.id}`)
    else if (!(await verify(row.phc, client.password))) violations.push(`G3: the hash is not that of ${client.name}`)
    if (session && !(await hasSession(system, reply, userId))) violations.push(`G3: ${client.name} has no session`)
  }
  return violations
}

/** Returns the password that matches the hash, or undefined if no client has it. */
async function findPassword(phc: string, clients: History['clients']): Promise<string | undefined> {
  for (const { password } of clients) if (await verify(phc, password)) return password
  return undefined
}

async function hasSession({ stores }: System, { cookies }: Reply, userId: string): Promise<boolean> {
  const sessionId = decodeURIComponent(cookies[0]?.value ?? '').split('.')[0]
  const stored = await stores.redis.get(`session:${sessionId}`)
  return stored !== null && JSON.parse(stored).user_id === userId
}
