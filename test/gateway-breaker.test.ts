import t, { type Test } from 'tap'
import { GatewayBreaker } from '#src/codes/gateway-breaker.js'

/*
 * When the messages to a gateway that fails are paused. test/sms-codes.test.ts has the answers to requests meanwhile.
 */

/** Returns a breaker whose clock belongs to the test. */
function startBreaker(t: Test) {
  let now = 1_000_000
  t.intercept(performance, 'now', { value: () => now })
  const breaker = new GatewayBreaker()
  const record = (names: string, hasFailed: boolean) => [...names].map((name) => breaker.record(name, hasFailed))
  return {
    breaker,
    /** Records a failure of each mobile, whose name is one letter. Returns for each whether it has opened the breaker. */
    fail: (names: string) => record(names, true),
    succeed: (names: string) => record(names, false),
    pass(ms: number) {
      now += ms
    }
  }
}

const closed = [false, false, false, false]

t.test('the fifth mobile that fails opens the breaker for 5 s', async (t) => {
  const { breaker, fail, pass } = startBreaker(t)
  t.equal(breaker.remainingPauseMs, 0)
  t.strictSame(fail('abcde'), [...closed, true])
  t.equal(breaker.remainingPauseMs, 5_000)
  pass(4_999)
  t.equal(breaker.remainingPauseMs, 1)
  pass(1)
  t.equal(breaker.remainingPauseMs, 0)
  pass(1)
  t.equal(breaker.remainingPauseMs, 0)
})

t.test('a mobile counts once, with its last result', async (t) => {
  const { fail, succeed } = startBreaker(t)
  t.strictSame(fail('aaaaaaaa'), Array(8).fill(false))
  t.strictSame(fail('bcd'), [false, false, false])
  succeed('d')
  t.strictSame(fail('e'), [false], 'of five mobiles one has succeeded since')
  t.strictSame(fail('d'), [true])
})

t.test('half of the mobiles must fail', async (t) => {
  const more = startBreaker(t)
  more.succeed('ABCDEF')
  t.strictSame(more.fail('abcde'), [...closed, false], '5 of 11')
  t.strictSame(more.fail('f'), [true], '6 of 12')

  const half = startBreaker(t)
  half.succeed('ABCDE')
  t.strictSame(half.fail('abcde'), [...closed, true], '5 of 10')
})

t.test('results count for 10 s', async (t) => {
  const { fail, succeed, pass } = startBreaker(t)
  succeed('ABCDE')
  pass(5_000)
  fail('abc')
  pass(4_999)
  t.strictSame(fail('d'), [false])
  pass(1)
  t.strictSame(fail('e'), [true], 'the successes no longer count')

  const later = startBreaker(t)
  later.fail('abcd')
  later.pass(10_000)
  t.strictSame(later.fail('e'), [false], 'the failures no longer count')
  t.strictSame(later.fail('abc'), [false, false, false])
  t.strictSame(later.fail('d'), [true])
})

t.test('a result during the pause does not count, and after it all begins again', async (t) => {
  const { breaker, fail, pass } = startBreaker(t)
  fail('abcde')
  pass(4_000)
  t.strictSame(fail('abcdefgh'), Array(8).fill(false))
  t.equal(breaker.remainingPauseMs, 1_000, 'the pause does not become longer')
  pass(1_000)
  t.strictSame(fail('abcd'), closed)
  t.strictSame(fail('e'), [true])
})
