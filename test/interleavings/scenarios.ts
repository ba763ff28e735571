export interface ClientSpec {
  name: string
  action: 'sign up' | 'reset'
  password: string
  /** Whether it has the code of the mobile. */
  hasCode: boolean
  address: string
  /** How often it sends its request: again after a 5xx, or after no answer. */
  attempts: number
}

/** Clients of one mobile, and what else may happen. */
export interface Scenario {
  name: string
  clients: readonly ClientSpec[]
  /** Whether the mobile has a user before. */
  isRegistered?: boolean
  /** What may happen once, at any moment. */
  events?: readonly ('a new code is sent' | 'the code expires')[]
  /** Whether the lease passes before each request, so that requests overtake each other. */
  isSlow?: boolean
  /** The wrong codes of a guesser: `SMS_CODE_ATTEMPTS`. */
  guesses?: number
}

const [ann, bob] = ['a password of Ann', 'a password of Bob']

const signUp = { action: 'sign up', hasCode: true, attempts: 2 } as const
const reset = { action: 'reset', hasCode: true, attempts: 2 } as const
const one = '192.0.2.1'
const other = '192.0.2.2'

export const scenarios: readonly Scenario[] = [
  {
    name: 'one client that retries',
    clients: [{ ...signUp, name: 'A', password: ann, address: one, attempts: 3 }]
  },
  {
    name: 'two requests with the same password',
    clients: [
      { ...signUp, name: 'A1', password: ann, address: one },
      { ...signUp, name: 'A2', password: ann, address: one }
    ]
  },
  {
    name: 'two passwords for one code',
    clients: [
      { ...signUp, name: 'A', password: ann, address: one },
      { ...signUp, name: 'B', password: bob, address: other, attempts: 1 }
    ]
  },
  {
    name: 'two requests that are slower than the lease',
    clients: [
      { ...signUp, name: 'A', password: ann, address: one, attempts: 1 },
      { ...signUp, name: 'B', password: bob, address: other, attempts: 1 }
    ],
    isSlow: true
  },
  {
    name: 'a sign-up and a wrong guess',
    clients: [
      { ...signUp, name: 'A', password: ann, address: one },
      { ...signUp, name: 'guesser', password: bob, address: other, hasCode: false, attempts: 1 }
    ]
  },
  {
    name: 'a guesser with one wrong code left',
    clients: [
      { ...signUp, name: 'guess', password: bob, address: other, hasCode: false, attempts: 1 },
      { ...signUp, name: 'right', password: bob, address: other, attempts: 1 }
    ],
    guesses: 1
  },
  {
    name: 'two resets with different passwords',
    clients: [
      { ...reset, name: 'A', password: ann, address: one },
      { ...reset, name: 'B', password: bob, address: other, attempts: 1 }
    ],
    isRegistered: true
  },
  {
    name: 'a sign-up and a new code',
    clients: [{ ...signUp, name: 'A', password: ann, address: one, attempts: 3 }],
    events: ['a new code is sent']
  },
  {
    name: 'a sign-up and the end of the code',
    clients: [
      { ...signUp, name: 'A1', password: ann, address: one },
      { ...signUp, name: 'A2', password: ann, address: one, attempts: 1 }
    ],
    events: ['the code expires']
  },
  {
    name: 'three requests with two passwords',
    clients: [
      { ...signUp, name: 'A1', password: ann, address: one, attempts: 1 },
      { ...signUp, name: 'A2', password: ann, address: one, attempts: 1 },
      { ...signUp, name: 'B', password: bob, address: other, attempts: 1 }
    ]
  }
]
