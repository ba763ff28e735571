export interface ClientSpec {
  name: string
  action: 'sign up' | 'reset'
  password: string
  /** The new code arrives with the event `a new code is sent`. Its client sends no request before. */
  presents: 'the code' | 'the new code' | 'a wrong code'
  address: string
  /** How often it sends its request at most. After a 5xx, or if no answer comes, it sends it again. */
  attempts: number
  /** Whether the hash of its first attempt fails, so that the request fails before its INSERT. */
  failsFirst?: boolean
}

/** `a code is issued`: the service makes another code, which reaches nobody. The run withdraws it later. */
export type ScenarioEvent = 'a new code is sent' | 'the code expires' | 'a code is issued'

/** Clients of one mobile, and what else may happen. */
export interface Scenario {
  name: string
  clients: readonly ClientSpec[]
  /** Whether the mobile has a user before. */
  isRegistered?: boolean
  /** What may happen once, at any moment. */
  events?: readonly ScenarioEvent[]
  /** Whether the lease passes before each request, so that requests overtake each other. */
  isSlow?: boolean
  /** The wrong codes of a guesser: `SMS_CODE_ATTEMPTS`. */
  guesses?: number
}

/** Two people who have the code, or guess it, each at an address. */
const ann = { password: 'a password of Ann', address: '192.0.2.1' }
const bob = { password: 'a password of Bob', address: '192.0.2.2' }

const signUp = { action: 'sign up', presents: 'the code', attempts: 2 } as const
const reset = { action: 'reset', presents: 'the code', attempts: 2 } as const

export const scenarios: readonly Scenario[] = [
  {
    name: 'one client that retries',
    clients: [{ ...signUp, ...ann, name: 'A', attempts: 3 }]
  },
  {
    name: 'two requests with the same password',
    clients: [
      { ...signUp, ...ann, name: 'A1' },
      { ...signUp, ...ann, name: 'A2' }
    ]
  },
  {
    name: 'two requests, one with a failed hash',
    clients: [
      { ...signUp, ...ann, name: 'A1', failsFirst: true },
      { ...signUp, ...ann, name: 'A2' }
    ]
  },
  {
    name: 'two passwords for one code',
    clients: [
      { ...signUp, ...ann, name: 'A' },
      { ...signUp, ...bob, name: 'B', attempts: 1 }
    ]
  },
  {
    name: 'two requests that are slower than the lease',
    clients: [
      { ...signUp, ...ann, name: 'A', attempts: 1 },
      { ...signUp, ...bob, name: 'B', attempts: 1 }
    ],
    isSlow: true
  },
  {
    name: 'a sign-up and a wrong guess',
    clients: [
      { ...signUp, ...ann, name: 'A' },
      { ...signUp, ...bob, name: 'guesser', presents: 'a wrong code', attempts: 1 }
    ]
  },
  {
    name: 'a guesser with one wrong code left',
    clients: [
      { ...signUp, ...bob, name: 'guess', presents: 'a wrong code', attempts: 1 },
      { ...signUp, ...bob, name: 'right', attempts: 1 }
    ],
    guesses: 1
  },
  {
    name: 'two resets with different passwords',
    clients: [
      { ...reset, ...ann, name: 'A' },
      { ...reset, ...bob, name: 'B', attempts: 1 }
    ],
    isRegistered: true
  },
  {
    name: 'two resets that are slower than the lease',
    clients: [
      { ...reset, ...ann, name: 'A', attempts: 1 },
      { ...reset, ...bob, name: 'B', attempts: 1 }
    ],
    isRegistered: true,
    isSlow: true
  },
  {
    name: 'a sign-up and a reset with one code',
    clients: [
      { ...signUp, ...ann, name: 'A' },
      { ...reset, ...bob, name: 'R', attempts: 1 }
    ]
  },
  {
    name: 'a sign-up and a new code',
    clients: [{ ...signUp, ...ann, name: 'A', attempts: 3 }],
    events: ['a new code is sent']
  },
  {
    name: 'two sign-ups, one with a new code',
    clients: [
      { ...signUp, ...ann, name: 'A', attempts: 1 },
      { ...signUp, ...bob, presents: 'the new code', name: 'N' }
    ],
    events: ['a new code is sent']
  },
  {
    name: 'a sign-up and a withdrawn code',
    clients: [{ ...signUp, ...ann, name: 'A', attempts: 3 }],
    events: ['a code is issued']
  },
  {
    name: 'a failed hash and a withdrawn code',
    clients: [{ ...signUp, ...ann, name: 'A', failsFirst: true }],
    events: ['a code is issued']
  },
  {
    name: 'a sign-up and the end of the code',
    clients: [
      { ...signUp, ...ann, name: 'A1' },
      { ...signUp, ...ann, name: 'A2', attempts: 1 }
    ],
    events: ['the code expires']
  },
  {
    name: 'three requests with two passwords',
    clients: [
      { ...signUp, ...ann, name: 'A1', attempts: 1 },
      { ...signUp, ...ann, name: 'A2', attempts: 1 },
      { ...signUp, ...bob, name: 'B', attempts: 1 }
    ]
  }
]
