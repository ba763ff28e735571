import { FastifyOtelInstrumentation } from '@fastify/otel'
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

/** How long the last spans of a process have to be sent. */
const flushMs = 2_000

/**
 * Messages of errors may quote a request or a row. The log has them, made safe, under the trace's id.
 */
class WithoutMessages implements SpanExporter {
  constructor(private readonly exporter: SpanExporter) {}

  export(spans: ReadableSpan[], done: Parameters<SpanExporter['export']>[1]): void {
    const bare = spans.map(
      (span): ReadableSpan =>
        Object.create(span, { status: { value: { code: span.status.code } }, events: { value: [] } })
    )
    this.exporter.export(bare, done)
  }

  shutdown(): Promise<void> {
    return this.exporter.shutdown()
  }
}

/**
 * Sends spans of requests and of their round trips to the stores to `OTEL_EXPORTER_OTLP_ENDPOINT`; OpenTelemetry reads this
 * and its other variables itself. To be called before `pg` and `ioredis` are loaded, which it instruments.
 *
 * @returns what ends it, and sends what is left
 */
export function startTracing(): () => Promise<void> {
  const provider = new NodeTracerProvider({
    resource: defaultResource()
      .merge(resourceFromAttributes({ 'service.name': 'mobile-signup' }))
      .merge(detectResources({ detectors: [envDetector] })),
    spanProcessors: [new BatchSpanProcessor(new WithoutMessages(new OTLPTraceExporter()))]
  })
  provider.register()
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
          // The URL may hold anything.
          span.setAttribute('url.path', url ?? '')
        }
      }),
      new PgInstrumentation({ requireParentSpan: true }),
      // Keys have mobiles and session ids, arguments codes.
      new IORedisInstrumentation({ requireParentSpan: true, dbStatementSerializer: (command) => command })
    ]
  })
  return () =>
    Promise.race([
      provider.shutdown().catch(() => undefined),
      new Promise<void>((resolve) => setTimeout(resolve, flushMs).unref())
    ])
}
