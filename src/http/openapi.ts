import swagger from '@fastify/swagger'
import { type TSchema, Type } from '@sinclair/typebox'
import type { FastifyContextConfig, FastifyReply } from 'fastify'
import fp from 'fastify-plugin'
import type { Config } from '../config/config.js'
import { type OutcomeName, outcomeNames, outcomes } from '../outcomes.js'
import { cookieNameOf } from './cookies.js'
import { byPreference, messageOf } from './replies.js'

const introduction = `
One request signs a person up: mobile number, one-time SMS code and password in; a durable user and a session out.

Every reply is \`{errno, errmsg, data?}\`. \`Accept-Language\` chooses between zh and en. 429 and 503 carry \`Retry-After\`
in seconds; **on any 5xx or no answer, send the same request again**: it ends in the same success. An unknown route is 404
with errno 4201. What HTTP or URL parsing refuses is a 4xx with errno 4201.
`

const tags = [
  { name: 'sign-up', description: 'What a code proves' },
  { name: 'session', description: 'Logging in and out, by a cookie' },
  { name: 'health', description: 'Probes of orchestrators and balancers' }
]

const retryAfter = { type: 'integer', minimum: 1, description: 'Seconds until the same request may succeed' }
const sessionCookie = {
  type: 'string',
  description: 'Sets or clears the session cookie; a success that sets it also sets the device cookie'
}
const replayed = { type: 'string', const: 'true', description: 'This is the success of an earlier, identical request' }
const requestId = { type: 'string', description: 'The id of the request in the log' }

/** Successes that set or clear the session cookie. */
const cookieOutcomes = new Set<OutcomeName>(['registered', 'logged_in', 'password_reset', 'logged_out'])
/** Successes that a retry repeats. */
const replayableOutcomes = new Set<OutcomeName>(['registered', 'password_reset', 'logged_in'])

/**
 * Serves the description of the API at `GET /openapi.json`, made from the schemas of the routes, and with `DOCS` a page at
 * `/docs`.
 */
export const openapi = fp<{ config: Config }>(
  async (fastify, { config }) => {
    await fastify.register(swagger, {
      openapi: {
        openapi: '3.1.0',
        info: {
          title: 'mobile-signup',
          version: '1.0',
          description: introduction,
          license: { name: 'MIT', identifier: 'MIT' }
        },
        servers: [{ url: '/' }],
        security: [],
        tags,
        components: {
          securitySchemes: {
            session: { type: 'apiKey', in: 'cookie', name: cookieNameOf('sid', config.cookieSecure) }
          }
        }
      },
      transform({ schema, url, route }) {
        if (route.config?.outcomes === undefined) return { schema: { hide: true }, url }
        const response = describeReplies(route.config, config)
        return { schema: { ...schema, headers: acceptLanguage, response }, url }
      }
    })
    // Serialised once, and kept as bytes: replies that wait to be read share them.
    let description: Buffer | undefined
    function sendDescription(reply: FastifyReply) {
      description ??= Buffer.from(JSON.stringify(fastify.swagger()))
      return reply.type('application/json; charset=utf-8').send(description)
    }
    fastify.route({ method: 'GET', url: '/openapi.json', handler: (_request, reply) => sendDescription(reply) })

    if (config.docs) {
      const { default: swaggerUi } = await import('@fastify/swagger-ui')
      await fastify.register(async (scope) => {
        // @fastify/static sets another Cache-Control on the files of the page.
        scope.addHook('onSend', async (_request, reply) => {
          reply.header('cache-control', 'no-store')
        })
        // The routes of swagger-ui would serialise the description for each request.
        scope.addHook('onRequest', async ({ routeOptions: { url = '' } }, reply) => {
          if (url.endsWith('/json')) return sendDescription(reply)
          if (url.endsWith('/yaml')) return reply.outcome('no_such_route')
        })
        await scope.register(swaggerUi, {
          routePrefix: '/docs',
          staticCSP: true,
          // swagger-ui's own policy loads a badge from another host and upgrades plain HTTP.
          transformStaticCSP: () =>
            "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'none'; frame-ancestors 'none'",
          uiConfig: { tryItOutEnabled: true, displayRequestDuration: true, validatorUrl: null }
        })
      })
    }
  },
  { fastify: '5.x', name: 'openapi', dependencies: ['replies'] }
)

const acceptLanguage = Type.Object({
  'accept-language': Type.Optional(Type.String({ description: 'The language of errmsg: zh or en', examples: ['en'] }))
})

/** Describes the replies of a route by their status, with an example of each outcome in each language. */
function describeReplies(route: FastifyContextConfig, config: Config) {
  // Every route may also answer what HTTP parsing refuses. It keeps its status under LEGACY_STATUS, as probes do.
  const names = outcomeNames.filter((name) => name === 'bad_request' || route.outcomes?.includes(name))
  const isLegacy = config.legacyStatus && !route.isProbe
  const statusOf = (name: OutcomeName) => (isLegacy && name !== 'bad_request' ? 200 : outcomes[name].status)
  const namesOf = (status: number) => names.filter((name) => statusOf(name) === status)
  const statuses = [...new Set(names.map(statusOf))]
  return Object.fromEntries(
    statuses.map((status) => [status, describeReply(namesOf(status), route.data ?? {}, config)])
  )
}

/** Describes the outcomes that share one status. */
function describeReply(names: OutcomeName[], dataSchemas: Partial<Record<OutcomeName, TSchema>>, config: Config) {
  const schemas = names.flatMap((name) => dataSchemas[name] ?? [])
  const examples = names.flatMap((name) =>
    byPreference(config.defaultLanguage).map((language) => {
      const errmsg = messageOf(name, language, config)
      const schema = dataSchemas[name]
      const value = { errno: outcomes[name].errno, errmsg, ...(schema && { data: exampleOf(schema) }) }
      return [language === config.defaultLanguage ? name : `${name} (${language})`, { summary: errmsg, value }]
    })
  )
  return {
    'x-response-description': names.map((name) => `${outcomes[name].en} (${name})`).join('; '),
    'x-examples': Object.fromEntries(examples),
    type: 'object',
    required: ['errno', 'errmsg', ...(schemas.length === names.length ? ['data'] : [])],
    properties: {
      errno: { type: 'string', enum: [...new Set(names.map((name) => outcomes[name].errno))] },
      errmsg: { type: 'string' },
      ...(schemas[0] && { data: schemas[0] })
    },
    headers: {
      'X-Request-Id': requestId,
      ...(names.some((name) => 'retryAfterSeconds' in outcomes[name]) && { 'Retry-After': retryAfter }),
      ...(names.some((name) => cookieOutcomes.has(name)) && { 'Set-Cookie': sessionCookie }),
      ...(names.some((name) => replayableOutcomes.has(name)) && { 'Idempotent-Replayed': replayed })
    }
  }
}

/** Returns an object of the first example of each field. */
function exampleOf({ properties }: TSchema): object {
  return Object.fromEntries(
    Object.entries<TSchema>(properties ?? {}).map(([name, { examples }]) => [
      name,
      Array.isArray(examples) ? examples[0] : null
    ])
  )
}
