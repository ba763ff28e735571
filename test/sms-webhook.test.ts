import { createHmac } from 'node:crypto'
import t, { type Test } from 'tap'
import { MessageNotSent, MessageRefused } from '../dist/codes/senders/sender.js'
import { webhookSender } from '../dist/codes/senders/webhook.js'

/*
 * What each end of a request to the SMS webhook says about its message. fetch is replaced, because a real connection cannot be
 * broken in every way. test/sms-codes.test.ts has a real webhook.
 */

const url = 'http://gateway.example/sms'
const message = { mobile: '13900001111', code: '123456', ttlSeconds: 300, id: 'an-id' }

/** An error as fetch throws it. */
const failure = (cause: unknown) => new TypeError('fetch failed', { cause })
const systemError = (code: string, syscall: string) => Object.assign(new Error(code), { code, syscall })
const refused = failure(systemError('ECONNREFUSED', 'connect'))
const reset = failure(systemError('ECONNRESET', 'read'))

/** Sends the message. Each request ends as the next of these says. Returns the requests, and the error if it fails. */
async function send(t: Test, ends: (Error | Response)[], secret?: string) {
  const requests: RequestInit[] = []
  const remaining = ends.values()
  t.intercept(globalThis, 'fetch', {
    async value(to: string, options: RequestInit) {
      t.equal(to, url)
      requests.push(options)
      const { value: end } = remaining.next()
      if (end instanceof Response) return end
      throw end
    }
  })
  const error: unknown = await webhookSender(url, secret)(message).catch((error) => error)
  return { requests, error }
}

const answer = (status: number) => new Response(null, { status })

t.test('a message is one POST of JSON, signed if there is a secret, and no redirect is followed', async (t) => {
  const { requests, error } = await send(t, [answer(200)])
  t.equal(error, undefined)
  const body = JSON.stringify({ mobile: message.mobile, code: message.code, ttl_s: 300, id: message.id })
  const [request, ...others] = requests
  t.strictSame(others, [])
  t.match(request, { method: 'POST', body, redirect: 'manual' })
  t.strictSame(request?.headers, { 'content-type': 'application/json' })

  t.intercept(Date, 'now', { value: () => 1_800_000_000_999 })
  const { requests: signed } = await send(t, [answer(204)], 'a secret')
  const mac = createHmac('sha256', 'a secret').update(`1800000000.${body}`).digest('hex')
  t.strictSame(signed[0]?.headers, {
    'content-type': 'application/json',
    'x-signature': `t=1800000000,v1=${mac}`
  })
})

t.test('a 4xx says that the gateway refuses the message; any other answer that it may have been sent', async (t) => {
  for (const status of [302, 399, 500, 503]) {
    const { requests, error } = await send(t, [answer(status)])
    t.equal(requests.length, 1)
    t.ok(error instanceof Error && !(error instanceof MessageNotSent), `${status}`)
    t.match(error, { message: `the SMS webhook answered ${status}` })
  }
  for (const status of [400, 499]) {
    const { error } = await send(t, [answer(status)])
    t.ok(error instanceof MessageRefused, `${status}`)
    t.match(error, { name: 'MessageRefused' })
  }
})

t.test('a connection that was never made is tried twice, and says that the message was not sent', async (t) => {
  const notFound = failure(systemError('ENOTFOUND', 'getaddrinfo'))
  const bothFamilies = failure(new AggregateError([refused.cause, refused.cause]))
  for (const [end, code] of [
    [refused, 'ECONNREFUSED'],
    [notFound, 'ENOTFOUND'],
    [bothFamilies, 'unknown']
  ] as const) {
    const { requests, error } = await send(t, [end, end])
    t.equal(requests.length, 2)
    t.ok(error instanceof MessageNotSent && !(error instanceof MessageRefused))
    t.match(error, { name: 'MessageNotSent', message: `the SMS webhook did not answer: ${code}` })
    t.equal((await send(t, [end, answer(200)])).error, undefined)
    t.ok((await send(t, [end, answer(400)])).error instanceof MessageRefused)
  }
})

t.test('a connection that broke is tried twice, and the message may have been sent, whatever follows', async (t) => {
  for (const code of ['ECONNRESET', 'EPIPE', 'ETIMEDOUT', 'UND_ERR_SOCKET']) {
    const broken = failure(systemError(code, 'read'))
    const { requests, error } = await send(t, [broken, broken])
    t.equal(requests.length, 2, code)
    t.ok(error instanceof Error && !(error instanceof MessageNotSent))
    t.match(error, { message: `the SMS webhook did not answer: ${code}` })
    t.equal((await send(t, [broken, answer(200)])).error, undefined)
  }
  for (const end of [refused, answer(400)]) {
    const { error } = await send(t, [reset, end])
    t.ok(error instanceof Error && !(error instanceof MessageNotSent))
  }
  const { error } = await send(t, [refused, reset])
  t.ok(error instanceof Error && !(error instanceof MessageNotSent))
})

t.test('anything else is tried once, and the message may have been sent', async (t) => {
  const oneReset = failure(new AggregateError([refused.cause, reset.cause]))
  for (const [end, code] of [
    [failure(systemError('HPE_INVALID_CONSTANT', 'parse')), 'HPE_INVALID_CONSTANT'],
    [failure(undefined), 'unknown'],
    [failure(null), 'unknown'],
    [oneReset, 'unknown']
  ] as const) {
    const { requests, error } = await send(t, [end])
    t.equal(requests.length, 1)
    t.ok(error instanceof Error && !(error instanceof MessageNotSent))
    t.match(error, { message: `the SMS webhook did not answer: ${code}` })
  }
})

t.test('an answer is read up to 64 KiB, so that its connection can be reused', async (t) => {
  for (const [chunkCount, readCount, isCancelled] of [
    [2, 2, false],
    [4, 3, true]
  ] as const) {
    let read = 0
    let cancelled = false
    const body = new ReadableStream(
      {
        pull(controller) {
          if (read === chunkCount) controller.close()
          else controller.enqueue(new Uint8Array(32_768).fill(++read))
        },
        cancel() {
          cancelled = true
        }
      },
      { highWaterMark: 0 }
    )
    t.equal((await send(t, [new Response(body)])).error, undefined)
    t.strictSame([read, cancelled], [readCount, isCancelled])
  }

  const broken = new ReadableStream({
    pull() {
      throw new Error('the connection broke')
    }
  })
  t.equal((await send(t, [new Response(broken)])).error, undefined, 'only the status counts')
})
