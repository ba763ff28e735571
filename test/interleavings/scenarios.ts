/** A client of one mobile. */
export interface ClientSpec {
  name: string
  action: 'sign up' | 'reset'
  password: string
  /** How often it sends its request at most. It sends it again after a 5xx, or if no answer comes. */
  attempts: number
  /** The new code arrives with the event. Its client sends no request before. */
  presents: 'the code' | 'the new code'
}

/** Clients of one mobile, and what else may happen. */
export interface Scenario {
  clients: readonly ClientSpec[]
  /** Whether the mobile has a user before, with a password that no client has. */
  isRegistered?: boolean
  /** Happens at any moment, at the latest when all clients have their answers. */
  event?: 'a new code is sent' | 'the code expires'
  /** Whether the lease passes before each request, so that two requests hold the code. */
  isSlow?: boolean
}

/** Ann and Bob both have the code. Each has a password, and two requests with one password are the same request. */
const signUp = (name: string, password: string, attempts: number): ClientSpec => {
  return { name, action: 'sign up', password, attempts, presents: 'the code' }
}
const reset = (...args: Parameters<typeof signUp>): ClientSpec => ({ ...signUp(...args), action: 'reset' })
const [ann, bob] = ['a password of Ann', 'a password of Bob']
const newcomer: ClientSpec = { ...signUp('N', bob, 2), presents: 'the new code' }

export const scenarios = {
  'one client that retries': { clients: [signUp('A', ann, 3)] },
  'two requests with one password': { clients: [signUp('A1', ann, 2), signUp('A2', ann, 2)] },
  'two slow requests with one password': { clients: [signUp('A1', ann, 1), signUp('A2', ann, 1)], isSlow: true },
  'two passwords for one code': { clients: [signUp('A', ann, 2), signUp('B', bob, 1)] },
  'two slow requests with two passwords': { clients: [signUp('A', ann, 1), signUp('B', bob, 1)], isSlow: true },
  'three requests with two passwords': { clients: [signUp('A', ann, 1), signUp('B', bob, 1), signUp('A2', ann, 1)] },
  'two sign-ups of a registered mobile': { clients: [signUp('A', ann, 2), signUp('B', bob, 1)], isRegistered: true },
  'two resets': { clients: [reset('A', ann, 2), reset('B', bob, 1)], isRegistered: true },
  'two slow resets': { clients: [reset('A', ann, 1), reset('B', bob, 1)], isRegistered: true, isSlow: true },
  'a sign-up and a reset with one code': { clients: [signUp('A', ann, 2), reset('R', bob, 1)] },
  'a sign-up and a new code': { clients: [signUp('A', ann, 3)], event: 'a new code is sent' },
  'two sign-ups, one with a new code': { clients: [signUp('A', ann, 1), newcomer], event: 'a new code is sent' },
  'a code that expires': { clients: [signUp('A1', ann, 2), signUp('A2', ann, 1)], event: 'the code expires' }
} satisfies Record<string, Scenario>
