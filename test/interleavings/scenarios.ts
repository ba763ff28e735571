export interface ClientSpec {
  name: string
  action: 'sign up' | 'reset'
  password: string
  address: string
  /** How often it sends its request at most. After a 5xx, or if no answer comes, it sends it again. */
  attempts: number
  /** The new code arrives with the event `a new code is sent`. Its client sends no request before. */
  presents: 'the code' | 'the new code' | 'a wrong code'
  /** What goes wrong in its first attempt: it fails before its INSERT, or it looks for a row where the row is not yet. */
  firstAttempt?: 'fails to hash' | 'reads from a former primary'
}

/** The service issues a code that reaches nobody. */
export type ScenarioEvent = 'a new code is sent' | 'the code expires' | 'a code is issued' | 'that code is withdrawn'

/** Clients of one mobile, and what else may happen. */
export interface Scenario {
  clients: readonly ClientSpec[]
  /** Whether the mobile has a user before, with a password that no client has. */
  isRegistered?: boolean
  /** What may happen at any moment, in this order. The second one happens at the end at the latest. */
  events?: readonly ScenarioEvent[]
  /** Whether the lease passes before each request, so that requests overtake each other. */
  isSlow?: boolean
  /** The wrong codes of a guesser: `SMS_CODE_ATTEMPTS`. */
  guesses?: number
}

/** Two people who have the code, or guess it. */
const ann = { password: 'a password of Ann', address: '192.0.2.1' }
const bob = { password: 'a password of Bob', address: '192.0.2.2' }

const signUp = (name: string, person: typeof ann, attempts: number, details?: Partial<ClientSpec>): ClientSpec => {
  return { name, action: 'sign up', ...person, attempts, presents: 'the code', ...details }
}
const reset = (...args: Parameters<typeof signUp>): ClientSpec => ({ ...signUp(...args), action: 'reset' })

const wrong = { presents: 'a wrong code' } as const
const newer = { presents: 'the new code' } as const
const failing = { firstAttempt: 'fails to hash' } as const
const stale = { firstAttempt: 'reads from a former primary' } as const

const twoSignUps = [signUp('A', ann, 2), signUp('B', bob, 1)]
const twoSlowSignUps = [signUp('A', ann, 1), signUp('B', bob, 1)]
const twoRetries = [signUp('A1', ann, 2), signUp('A2', ann, 2)]
const twoResets = [reset('A', ann, 2), reset('B', bob, 1)]
const newCode = ['a new code is sent'] as const
const withdrawal = ['a code is issued', 'that code is withdrawn'] as const

export const scenarios = {
  'one client that retries': { clients: [signUp('A', ann, 3)] },
  'two requests with one password': { clients: twoRetries },
  'two slow requests with one password': { clients: [signUp('A1', ann, 1), signUp('A2', ann, 1)], isSlow: true },
  'two requests, one with a failed hash': { clients: [signUp('A1', ann, 2, failing), signUp('A2', ann, 2)] },
  'a repeat that reads from a former primary': { clients: [signUp('A1', ann, 2), signUp('A2', ann, 2, stale)] },
  'two passwords for one code': { clients: twoSignUps },
  'two slow requests with two passwords': { clients: twoSlowSignUps, isSlow: true },
  'three requests with two passwords': { clients: [...twoSlowSignUps, signUp('A2', ann, 1)] },
  'two sign-ups of a registered mobile': { clients: twoSignUps, isRegistered: true },
  'a sign-up and a wrong guess': { clients: [signUp('A', ann, 2), signUp('guesser', bob, 1, wrong)] },
  'one wrong code left': { clients: [signUp('guess', bob, 1, wrong), signUp('right', bob, 1)], guesses: 1 },
  'two resets': { clients: twoResets, isRegistered: true },
  'two slow resets': { clients: [reset('A', ann, 1), reset('B', bob, 1)], isRegistered: true, isSlow: true },
  'two resets, one with a stale read': { clients: [reset('A', ann, 2), reset('B', bob, 1, stale)], isRegistered: true },
  'a sign-up and a reset with one code': { clients: [signUp('A', ann, 2), reset('R', bob, 1)] },
  'a sign-up and a new code': { clients: [signUp('A', ann, 3)], events: newCode },
  'two sign-ups, one with a new code': { clients: [signUp('A', ann, 1), signUp('N', bob, 2, newer)], events: newCode },
  'a sign-up and a withdrawn code': { clients: [signUp('A', ann, 3)], events: withdrawal },
  'a failed hash and a withdrawn code': { clients: [signUp('A', ann, 2, failing)], events: withdrawal },
  'a sign-up and the end of the code': {
    clients: [signUp('A1', ann, 2), signUp('A2', ann, 1)],
    events: ['the code expires']
  }
} satisfies Record<string, Scenario>
