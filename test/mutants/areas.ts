/** Sources that are mutated together. */
export interface Area {
  name: string
  /** Globs. */
  sources: readonly string[]
  /** Names of the test files that cover the sources, the fast ones first: few mutants survive them. */
  tests: readonly string[]
  /** Whether the sources run in a thread. Then every test file runs for each mutant. */
  isThread?: boolean
}

export const areas: readonly Area[] = [
  {
    name: 'codes',
    sources: ['src/codes/**/*.ts'],
    tests: [
      'limits',
      'tickets',
      'gateway-breaker',
      'sms-webhook',
      'codes',
      'sms-codes',
      'openapi',
      'strangers',
      'claims',
      'metrics'
    ]
  },
  {
    name: 'users',
    sources: ['src/users/**/*.ts'],
    tests: ['password-reset', 'claims', 'openapi', 'epochs', 'sign-up', 'strangers', 'logins', 'hash-pool', 'faults']
  },
  {
    name: 'sessions',
    sources: ['src/sessions/**/*.ts'],
    tests: ['limits', 'session-index', 'openapi', 'epochs', 'logins', 'sessions', 'strangers', 'hash-pool']
  },
  {
    name: 'passwords',
    sources: ['src/passwords/**/*.ts'],
    tests: ['hash-pool', 'event-coalescing', 'logins', 'sign-up']
  },
  { name: 'hash-thread', sources: ['src/passwords/hash-thread.js'], tests: ['hash-pool', 'logins'], isThread: true },
  { name: 'limits', sources: ['src/stores/rate-limits.ts'], tests: ['rate-limits', 'sms-codes', 'logins'] },
  { name: 'outcomes', sources: ['src/outcomes.ts'], tests: ['outcomes', 'openapi'] }
]
