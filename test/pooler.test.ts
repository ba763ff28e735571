import t from 'tap'

/*
 * `PG_POOLER=transaction`: the tests of sign-ups, logins and resets pass through a PgBouncer in transaction mode.
 */

for (const file of ['sign-up', 'logins', 'password-reset']) {
  t.spawn(process.execPath, ['--import=tsx/esm', `test/${file}.test.ts`], {
    env: { ...process.env, TESTBED_POOLER: 'transaction' }
  })
}
