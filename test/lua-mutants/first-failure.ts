import assert from 'node:assert/strict'
import { register } from 'node:module'
import { setTimeout as sleep } from 'node:timers/promises'
import { Redis } from 'ioredis'

/*
 * Runs a test file in this process, until its first failure. A process for each mutant would need some seconds of CPU time to
 * start, mostly for the same modules. So the file is imported again for each mutant, with a `tap` that throws at the first
 * failure, and ioredis gets the changed script.
 */

/** A run that takes longer has found a mutant. */
const limitMs = 60_000

/** What the file uses of a test of tap. */
export class FailingTest {
  private readonly tests: (() => Promise<void>)[] = []
  private readonly teardowns: (() => unknown)[] = []

  readonly test = (name: string, run: (t: FailingTest) => Promise<void>) => {
    this.tests.push(async () => {
      const t = new FailingTest()
      try {
        await run(t)
      } catch (error) {
        throw new Error(name, { cause: error })
      } finally {
        await t.end()
      }
    })
  }
  readonly teardown = (teardown: () => unknown) => this.teardowns.unshift(teardown)
  readonly after = this.teardown

  readonly ok = (value: unknown) => assert.ok(value)
  readonly equal = (actual: unknown, expected: unknown) => assert.equal(actual, expected)
  readonly not = (actual: unknown, expected: unknown) => assert.notEqual(actual, expected)
  readonly strictSame = (actual: unknown, expected: unknown) => assert.deepEqual(actual, expected)
  readonly match = (actual: unknown, pattern: unknown) => assert.ok(matches(actual, pattern))
  readonly notMatch = (actual: unknown, pattern: unknown) => assert.ok(!matches(actual, pattern))
  readonly rejects = (promise: Promise<unknown>, error: object) => assert.rejects(promise, error)

  async runTests(): Promise<void> {
    for (const test of this.tests) await test()
  }

  async end(): Promise<void> {
    for (const teardown of this.teardowns) await teardown()
  }
}

/** Whether a value matches a pattern as in tap: objects by the fields of the pattern, texts by a part or an expression. */
function matches(actual: unknown, pattern: unknown): boolean {
  if (pattern instanceof RegExp) return pattern.test(`${actual}`)
  if (typeof pattern === 'string') return typeof actual === 'string' && actual.includes(pattern)
  if (typeof pattern !== 'object' || pattern === null) return Object.is(actual, pattern)
  if (typeof actual !== 'object' || actual === null) return false
  const fields = new Map(Object.entries(actual))
  return Object.entries(pattern).every(([name, field]) => matches(fields.get(name), field))
}

/** The test that the imported file gets as the default export of `tap`. */
let root = new FailingTest()
export const currentRoot = () => root

/** Replaces a script, or a part of one, by its mutant. */
let mutate = (lua: string) => lua

const { defineCommand } = Redis.prototype
Redis.prototype.defineCommand = function (name, definition) {
  return defineCommand.call(this, name, { ...definition, lua: mutate(definition.lua) })
}

// A module for each import, because the root is another one.
const tapModule = `import { currentRoot } from ${JSON.stringify(import.meta.url)}; export default currentRoot() //`
const hooks = `
let count = 0
export function resolve(specifier, context, next) {
  if (specifier !== 'tap' || !context.parentURL?.includes('?mutant')) return next(specifier, context)
  return { url: ${JSON.stringify(dataUrl(tapModule))} + count++, shortCircuit: true }
}`
register(dataUrl(hooks))

// A test that has failed may have requests in flight.
process.on('unhandledRejection', () => undefined)

let runs = 0

/** Runs a test file with a mutant of a script. Returns the name of the test that fails first, or undefined if all pass. */
export async function firstFailure(test: string, lua: string, mutant: string): Promise<string | undefined> {
  mutate = (defined) => defined.replace(lua, () => mutant)
  const t = new FailingTest()
  root = t
  async function run(): Promise<void> {
    await import(`../${test}.test.ts?mutant=${runs++}`)
    await t.runTests()
  }
  const timer = new AbortController()
  const timeout = sleep(limitMs, undefined, { signal: timer.signal }).then(() => {
    throw new Error('timeout')
  })
  try {
    await Promise.race([run(), timeout])
    await t.end()
    return undefined
  } catch (error) {
    await t.end().catch(() => undefined)
    return error instanceof Error ? error.message : 'unknown'
  } finally {
    timer.abort()
  }
}

function dataUrl(source: string): string {
  return `data:text/javascript,${encodeURIComponent(source)}`
}
