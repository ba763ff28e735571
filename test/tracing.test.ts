import { createServer } from 'node:http'
import t, { type Test } from 'tap'
import { client } from '../testkit/client.js'
import { listen } from '../testkit/listen.js'
import { claimKey, startTestbed } from '../testkit/testbed.js'
import { until } from '../testkit/until.js'

const { redis, startService, signUpBody, issueCode, cookieOf } = await startTestbed(t)

// Each test starts a service of its own.
t.jobs = 2

interface Span {
  name: string
  traceId: string
  spanId: string
  parentSpanId?: string
  kind: number
}

/** The kind of a span that a request to the service starts. */
const serverKind = 2

/** The span of the gateway, the parent of a request's span. */
const gatewaySpanId = '00f067aa0ba902b7'

const traceparent = (traceId: string, isSampled: boolean) => ({
  traceparent: `00-${traceId}-${gatewaySpanId}-${isSampled ? '01' : '00'}`
})

/** Starts a collector of OTLP over HTTP on loopback. */
async function startCollector(t: Test) {
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
  collector.url = await listen(t, server)
  return collector
}

t.test('a sign-up is one span of the gateway’s trace, above its round trips, and contains no secret', async (t) => {
  const collector = await startCollector(t)
  const service = startService(t, {
    OTEL_EXPORTER_OTLP_ENDPOINT: collector.url,
    OTEL_RESOURCE_ATTRIBUTES: 'zone=a',
    OTEL_BSP_SCHEDULE_DELAY: '100'
  })
  const url = await service.url()
  const bodies = await Promise.all(Array.from({ length: 8 }, () => signUpBody()))
  const traceIdOf = (index: number) => `${index + 1}`.padStart(32, '0')
  const cookies = await Promise.all(
    bodies.map(async (body, index) => {
      const reply = await client(url).signUp(body, { headers: traceparent(traceIdOf(index), true) })
      t.equal(reply.statusCode, 201)
      return cookieOf(reply)
    })
  )
  const unsampledTraceId = 'f'.repeat(32)
  const [body] = bodies
  if (body === undefined) throw new Error('no sign-up')
  const { mobile, password } = body
  await client(url).signUp(body, { headers: traceparent(unsampledTraceId, false) })
  await fetch(`${url}/${mobile}?password=${password}`)
  await client(url).signUp(password)
  // The script of the hold fails, with an error that quotes the claim.
  await redis.set(claimKey(mobile), 'not JSON')
  await client(url).signUp({ ...body, sms_code: await issueCode(mobile) })
  await fetch(`${url}/health/ready`)

  // Eight sign-ups, a body that is not JSON, and the failed hold. The span of a request ends after those of its round trips.
  await until('the collector has the spans of all sampled sign-ups', () => {
    const requests = collector.spans.filter(({ kind, name }) => kind === serverKind && name === 'POST /api/v1.0/users')
    return requests.length === 10
  })
  t.equal(await service.stop(), 0)

  for (const index of bodies.keys()) {
    const spans = collector.spans.filter(({ traceId }) => traceId === traceIdOf(index))
    const [request, ...otherRequests] = spans.filter(({ kind }) => kind === serverKind)
    t.equal(otherRequests.length, 0)
    t.match(request, { name: 'POST /api/v1.0/users', parentSpanId: gatewaySpanId })
    const children = spans.filter(({ parentSpanId }) => parentSpanId === request?.spanId).map(({ name }) => name)
    t.ok(children.filter((name) => name.startsWith('evalsha')).length >= 2, `${children}`)
    t.ok(
      children.some((name) => name.startsWith('pg.query:INSERT') || name.startsWith('pg-pool')),
      `${children}`
    )
    t.ok(children.includes('set'))
    const spanIds = new Set([gatewaySpanId, ...spans.map(({ spanId }) => spanId)])
    t.ok(
      spans.every(({ parentSpanId = '' }) => spanIds.has(parentSpanId)),
      'every span has its parent'
    )
  }
  const hasUnsampled = collector.spans.some(({ traceId }) => traceId === unsampledTraceId)
  t.notOk(hasUnsampled, 'a request that the gateway does not sample is not sent')
  t.notMatch(collector.received, '/health/')
  t.match(service.stdout, 'user_script', 'the log has the error of Redis')
  t.notMatch(collector.received, 'user_script', 'no span has it')
  t.match(collector.received, '"mobile-signup"')
  t.match(collector.received, '"zone"')
  t.match(service.stdout, `"trace_id":"${traceIdOf(0)}"`, 'the log has the trace id')

  const sessionIds = cookies.map((cookie) => /sid=([^.%;]+)/.exec(cookie)?.[1])
  const secrets = bodies.flatMap(({ mobile, sms_code, password }) => [mobile, sms_code, password])
  for (const secret of [...secrets, ...sessionIds, 'not JSON']) t.notOk(collector.received.includes(`${secret}`))
})

t.test('G7: no header puts a mobile number into a span or a log line', async (t) => {
  const collector = await startCollector(t)
  const service = startService(t, { OTEL_EXPORTER_OTLP_ENDPOINT: collector.url, OTEL_BSP_SCHEDULE_DELAY: '100' })
  const url = await service.url()
  const mobile = '13812345678'
  const traceId = 'a'.repeat(32)
  for (const headers of [
    { ...traceparent(traceId, true), tracestate: `m=${mobile}`, baggage: `m=${mobile}` },
    { ...traceparent(traceId, true), tracestate: `m=${[...mobile].map((digit) => `%3${digit}`).join('')}` },
    traceparent(mobile.padStart(32, '0'), true),
    { traceparent: `00-${traceId}-${mobile.padEnd(16, '0')}-01` },
    { traceparent: `cc-${traceId}-${gatewaySpanId}-01-${mobile}` },
    { 'x-request-id': `0${mobile}` },
    { 'user-agent': mobile, host: `${mobile}.example`, cookie: `sid=${mobile}`, referer: `http://a/${mobile}` }
  ]) {
    await fetch(`${url}/api/v1.0/session?m=${mobile}`, { headers })
  }
  t.equal(await service.stop(), 0)
  const requests = collector.spans.filter(({ kind }) => kind === serverKind)
  t.equal(requests.length, 7)
  t.equal(requests.filter((span) => span.traceId === traceId && span.parentSpanId === gatewaySpanId).length, 2)
  for (const text of [collector.received, service.stdout]) {
    t.notMatch(text, mobile)
    t.notMatch(text, '%31%33%38')
  }
})

t.test('a shutdown sends the last spans', async (t) => {
  const collector = await startCollector(t)
  // Without the shutdown they would be sent after a minute.
  const service = startService(t, {
    OTEL_EXPORTER_OTLP_ENDPOINT: collector.url,
    OTEL_BSP_SCHEDULE_DELAY: '60000'
  })
  t.equal((await client(await service.url()).signUp(await signUpBody())).statusCode, 201)
  t.equal(collector.spans.length, 0)
  t.equal(await service.stop(), 0)
  t.match(collector.spans.map(({ name }) => name).join(), 'POST /api/v1.0/users')
})

t.test('with an unavailable collector, requests succeed and a shutdown ends with 0', async (t) => {
  const service = startService(t, { OTEL_EXPORTER_OTLP_ENDPOINT: 'http://127.0.0.1:1' })
  t.equal((await client(await service.url()).signUp(await signUpBody())).statusCode, 201)
  t.equal(await service.stop(), 0, 'within SHUTDOWN_TIMEOUT_MS')
  t.equal(service.stderr, '')
})

t.test('without an endpoint only the API package of OpenTelemetry is loaded, by prom-client', async (t) => {
  const printLoaded = `
    import { createRequire } from 'node:module'
    const { cache } = createRequire('/')
    process.on('exit', () => {
      const loaded = Object.keys(cache).filter((path) => /opentelemetry|@fastify.otel/.test(path))
      console.log('loaded: ' + [...new Set(loaded.map((path) => /(@opentelemetry|@fastify).[a-z-]+/.exec(path)[0]))])
    })`
  const service = startService(t, {
    NODE_OPTIONS: `--import=data:text/javascript,${encodeURIComponent(printLoaded)}`
  })
  await service.url()
  t.equal(await service.stop(), 0)
  t.match(service.stdout, /^loaded: (@opentelemetry.api)?$/m)
})
