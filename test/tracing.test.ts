import { once } from 'node:events'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import t, { type Test } from 'tap'
import { issueCode, redis, signUpBody, until } from './helper.js'
import { named, said, start } from './service.js'

interface Span {
  name: string
  traceId: string
  spanId: string
  parentSpanId?: string
  kind: number
  attributes: { key: string; value: { stringValue?: string; intValue?: number } }[]
}

/** A collector of OTLP over HTTP. */
async function openCollector(t: Test) {
  const collector = { url: '', received: '', spans: [] as Span[] }
  const server = createServer(async (request, response) => {
    let body = ''
    for await (const chunk of request) body += chunk
    collector.received += body
    for (const { scopeSpans } of JSON.parse(body).resourceSpans) {
      for (const { spans } of scopeSpans) collector.spans.push(...spans)
    }
    response.setHeader('content-type', 'application/json').end('{}')
  })
  await once(server.listen(0, '127.0.0.1'), 'listening')
  t.teardown(() => {
    server.closeAllConnections()
    server.close()
  })
  collector.url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
  return collector
}

const signUp = (url: string | undefined, body: object, headers = {}) =>
  fetch(`${url}/api/v1.0/users`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', ...headers },
    body: JSON.stringify(body)
  })

t.test(
  'a sign-up is one span of the gateway’s trace, with its round trips below it, and tells nothing secret',
  async (t) => {
    const collector = await openCollector(t)
    const run = start(t, { ...named, OTEL_EXPORTER_OTLP_ENDPOINT: collector.url, OTEL_RESOURCE_ATTRIBUTES: 'zone=a' })
    const [, url] = await said(run, /Server listening at (http:[^"]+)/)
    const bodies = await Promise.all(Array.from({ length: 8 }, () => signUpBody()))
    const traceIdOf = (n: number) => `${n + 1}`.padStart(32, '0')
    const cookies = await Promise.all(
      bodies.map(async (body, n) => {
        const reply = await signUp(url, body, { traceparent: `00-${traceIdOf(n)}-00f067aa0ba902b7-01` })
        t.equal(reply.status, 201)
        return reply.headers.getSetCookie()[0]
      })
    )
    await signUp(url, bodies[0] ?? {}, { traceparent: `00-${'f'.repeat(32)}-00f067aa0ba902b7-00` })
    const [stray] = bodies
    await fetch(`${url}/${stray?.mobile}?password=${stray?.password}`)
    await fetch(`${url}/api/v1.0/users`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: `${stray?.password}`
    })
    const mobile = `${stray?.mobile}`
    await redis.set(`sms_code_${mobile}`, 'not a code of ours')
    await redis.set(`{sms_code_${mobile}}:attempt`, 'no JSON, so that the script fails')
    await signUp(url, { ...stray, sms_code: await issueCode(mobile) })
    await fetch(`${url}/health/ready`)
    run.child.kill('SIGTERM')
    t.strictSame(await run.exit, [0, null])

    for (const [n] of bodies.entries()) {
      const spans = collector.spans.filter(({ traceId }) => traceId === traceIdOf(n))
      const [request, ...others] = spans.filter(({ kind }) => kind === 2)
      t.equal(others.length, 0)
      t.match(request, { name: 'POST /api/v1.0/users', parentSpanId: '00f067aa0ba902b7' })
      const children = spans.filter(({ parentSpanId }) => parentSpanId === request?.spanId).map(({ name }) => name)
      t.ok(children.filter((name) => name.startsWith('evalsha')).length >= 2, `${children}`)
      t.ok(
        children.some((name) => name.startsWith('pg.query:INSERT') || name.startsWith('pg-pool')),
        `${children}`
      )
      t.ok(children.includes('set'))
      const ids = new Set(spans.map(({ spanId }) => spanId))
      t.ok(spans.every(({ parentSpanId }) => parentSpanId === '00f067aa0ba902b7' || ids.has(`${parentSpanId}`)))
    }
    t.notOk(
      collector.spans.some(({ traceId }) => traceId === 'f'.repeat(32)),
      'what the gateway does not sample is not sent'
    )
    t.notMatch(collector.received, '/health/')
    t.match(run.output.stdout, 'user_script', 'an error of Redis is in the log')
    t.notMatch(collector.received, 'user_script', 'and in no span')
    t.match(collector.received, '"mobile-signup"')
    t.match(collector.received, '"zone"')
    t.match(run.output.stdout, `"trace_id":"${traceIdOf(0)}"`, 'the log names the trace')

    const sessionIds = cookies.map((cookie) => /sid=([^.%;]+)/.exec(`${cookie}`)?.[1])
    const secrets = bodies.flatMap(({ mobile, sms_code, password }) => [mobile, sms_code, password])
    for (const secret of [...secrets, ...sessionIds, 'not a code of ours'])
      t.notOk(collector.received.includes(`${secret}`))
  }
)

t.test('a collector that is away delays nothing, and no shutdown for long', async (t) => {
  const run = start(t, { ...named, OTEL_EXPORTER_OTLP_ENDPOINT: 'http://127.0.0.1:1' })
  const [, url] = await said(run, /Server listening at (http:[^"]+)/)
  t.equal((await signUp(url, await signUpBody())).status, 201)
  run.child.kill('SIGTERM')
  t.strictSame(await run.exit, [0, null])
  t.equal(run.output.stderr, '')
})

t.test('without an endpoint nothing of OpenTelemetry is loaded but the interface that prom-client names', async (t) => {
  const list = `
    import { createRequire } from 'node:module'
    const { cache } = createRequire('/')
    process.on('exit', () => {
      const loaded = Object.keys(cache).filter((path) => /opentelemetry|@fastify.otel/.test(path))
      console.log('loaded: ' + [...new Set(loaded.map((path) => /(@opentelemetry|@fastify).[a-z-]+/.exec(path)[0]))])
    })`
  const run = start(t, { ...named, NODE_OPTIONS: `--import=data:text/javascript,${encodeURIComponent(list)}` })
  await said(run, /Server listening at/)
  run.child.kill('SIGTERM')
  t.strictSame(await run.exit, [0, null])
  await until(async () => run.output.stdout.includes('loaded: '))
  t.match(run.output.stdout, /loaded: (@opentelemetry.api)?\n$/)
})
