import { FastifyOtelInstrumentation } from '@fastify/otel'
import { type TextMapPropagator, trace } from '@opentelemetry/api'
import { OTLPTraceExporter } from '@opentelemetry/exporter-trace-otlp-http'
import { registerInstrumentations } from '@opentelemetry/instrumentation'
import { IORedisInstrumentation } from '@opentelemetry/instrumentation-ioredis'
import { PgInstrumentation } from '@opentelemetry/instrumentation-pg'
import { defaultResource, detectResources, envDetector, resourceFromAttributes } from '@opentelemetry/resources'
import {
  BatchSpanProcessor,
  NodeTracerProvider,
  type ReadableSpan,
  type SpanExporter
} from '@opentelemetry/sdk-trace-node'
import { maskMobiles } from './log.js'

/** How long a stopping process waits for its last spans to be sent. */
const flushTimeoutMs = 2_000

/** Removes error messages from spans: they may quote a request or a row. The log has them, redacted. */
class MessageRemover implements SpanExporter {
  constructor(private readonly exporter: SpanExporter) {}

  export(spans: ReadableSpan[], done: Parameters<SpanExporter['export']>[1]): void {
    const withoutMessages = spans.map(
      (span): ReadableSpan =>
        Object.create(span, { status: { value: { code: span.status.code } }, events: { value: [] } })
    )
    this.exporter.export(withoutMessages, done)
  }

  shutdown(): Promise<void> {
    return this.exporter.shutdown()
  }
}

/** Any version of W3C Trace Context. */
const traceparent = /^(?!ff)[\da-f]{2}-(?!0{32})([\da-f]{32})-(?!0{16})([\da-f]{16})-([\da-f]{2})(?:-.*)?$/

/**
 * Joins the trace of a `traceparent`. Not that of one with a mobile number in it, because spans and the log have its ids, and
 * never with its `tracestate`, which may be any text.
 */
const traceContext: TextMapPropagator = {
  fields: () => ['traceparent'],
  inject: () => undefined,
  extract(context, carrier, getter) {
    const header = `${getter.get(carrier, 'traceparent') ?? ''}`
    const [, traceId, spanId, flags] = traceparent.exec(header) ?? []
    if (traceId === undefined || spanId === undefined || maskMobiles(header) !== header) return context
    return trace.setSpanContext(context, { traceId, spanId, traceFlags: Number(`0x${flags}`), isRemote: true })
  }
}

/**
 * Sends spans of requests and of their round trips to `OTEL_EXPORTER_OTLP_ENDPOINT`. OpenTelemetry itself reads this
 * variable and its others. Call it before `pg` and `ioredis` are loaded: it instruments them.
 *
 * @returns a function that sends the last spans and stops
 */
export function startTracing(): () => Promise<void> {
  const provider = new NodeTracerProvider({
    resource: defaultResource()
      .merge(resourceFromAttributes({ 'service.name': 'mobile-signup' }))
      .merge(detectResources({ detectors: [envDetector] })),
    spanProcessors: [new BatchSpanProcessor(new MessageRemover(new OTLPTraceExporter()))]
  })
  provider.register({ propagator: traceContext })
  registerInstrumentations({
    instrumentations: [
      new FastifyOtelInstrumentation({
        registerOnInitialization: true,
        instrumentHooks: false,
        instrumentHandler: false,
        ignorePaths: ({ url }) => url.startsWith('/health/'),
        requestHook(span, request) {
          const { method, routeOptions } = request
          const { url } = routeOptions
          request.traceId = span.spanContext().traceId
          span.updateName(url === undefined ? method : `${method} ${url}`)
          // The route instead of the URL, which may contain anything.
          span.setAttribute('url.path', url ?? '')
        }
      }),
      new PgInstrumentation({ requireParentSpan: true }),
      // The command without its arguments: keys contain mobiles and session ids, values contain codes.
      new IORedisInstrumentation({ requireParentSpan: true, dbStatementSerializer: (command) => command })
    ]
  })
  return () =>
    Promise.race([
      provider.shutdown().catch(() => undefined),
      new Promise<void>((resolve) => setTimeout(resolve, flushTimeoutMs).unref())
    ])
}
