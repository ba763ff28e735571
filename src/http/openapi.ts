import swagger from '@fastify/swagger'
import { type TSchema, Type } from '@sinclair/typebox'
import fp from 'fastify-plugin'
import { type Config, passwordMax } from '../config/config.js'
import { type Language, languages, type OutcomeName, outcomes, type RouteOutcomes } from '../outcomes.js'

declare module 'fastify' {
  interface FastifyContextConfig {
    /** What the route may answer, for the description of the API. A route without is not described. */
    outcomes?: RouteOutcomes
  }
}

type DescriptionConfig = Pick<Config, 'cookieSecure' | 'defaultLanguage' | 'docs' | 'legacyStatus' | 'passwordMin'>

const introduction = `
One request signs a person up: mobile number, one-time SMS code and password in; a durable user and a session out.

Every reply is \`{errno, errmsg, data?}\`. \`Accept-Language\` chooses between zh and en. A 429 and a 503 carry \`Retry-After\`
in seconds; **on 503, 500 or no answer send the same request again**: it ends in the same success. An unknown route is 404
with errno 4201, and so is, with a 4xx, what HTTP or URL parsing refuses.
`

const tags = [
  { name: 'sign-up', description: 'From a code to a user' },
  { name: 'session', description: 'Logging in and out, by a cookie' },
  { name: 'health', description: 'For the probes of an orchestrator or a balancer' }
]

const retryAfter = { type: 'integer', minimum: 1, description: 'Seconds until the same request may succeed' }
const sessionCookie = { type: 'string', description: 'The session, or its end' }
const replayed = { type: 'string', const: 'true', description: 'The success of the same request before this one' }
const requestId = { type: 'string', description: 'Names the request as the log does' }

/** Successes that start a session or end it. */
const setCookie = new Set<OutcomeName>(['registered', 'logged_in', 'password_reset', 'logged_out'])
/** Successes of a code, which answer a retry, too. */
const replayable = new Set<OutcomeName>(['registered', 'password_reset'])

/** The description of the API as `GET /openapi.json`, from the routes' own schemas, and where `DOCS` says so a page at `/docs`. */
export const description = fp<DescriptionConfig>(
  async (fastify, config) => {
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
            session: { type: 'apiKey', in: 'cookie', name: config.cookieSecure ? '__Host-sid' : 'sid' }
          }
        }
      },
      transform({ schema, url, route }) {
        const answers = route.config?.outcomes
        if (answers === undefined) return { schema: { hide: true }, url }
        const legacy = config.legacyStatus && !route.config?.probe
        const response = describeReplies(answers, legacy, config.defaultLanguage, config.passwordMin)
        return { schema: { ...schema, headers: acceptLanguage, response }, url }
      }
    })
    fastify.route({ method: 'GET', url: '/openapi.json', handler: async () => fastify.swagger() })

    if (config.docs) {
      const { default: swaggerUi } = await import('@fastify/swagger-ui')
      await fastify.register(swaggerUi, {
        routePrefix: '/docs',
        staticCSP: true,
        // Nothing of another host, and plain HTTP as well.
        transformStaticCSP: () =>
          "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; object-src 'none'",
        uiConfig: { tryItOutEnabled: true, displayRequestDuration: true, validatorUrl: null }
      })
    }
  },
  { fastify: '5.x', name: 'description', dependencies: ['envelope'] }
)

const acceptLanguage = Type.Object({
  'accept-language': Type.Optional(Type.String({ description: 'The language of errmsg: zh or en', examples: ['en'] }))
})

/** The replies of a route, by their status. */
function describeReplies(ofRoute: RouteOutcomes, legacy: boolean, first: Language, passwordMin: number) {
  // What HTTP parsing refuses is no matter of the route, nor of the legacy status.
  const answers: RouteOutcomes = { ...ofRoute, bad_request: undefined }
  const names = Object.keys(outcomes).filter((name): name is OutcomeName => name in answers)
  const statusOf = (name: OutcomeName) => (legacy && name !== 'bad_request' ? 200 : outcomes[name].status)
  const statuses = [...new Set(names.map(statusOf))]
  return Object.fromEntries(
    statuses.map((status) => {
      const alike = names.filter((name) => statusOf(name) === status)
      const withData = alike.flatMap((name) => answers[name] ?? [])
      const examples = alike.flatMap((name) =>
        [first, ...languages.filter((language) => language !== first)].map((language) => {
          const { errno, [language]: message } = outcomes[name]
          const errmsg = message.replace('{min}', `${passwordMin}`).replace('{max}', `${passwordMax}`)
          const data = answers[name]
          const value = { errno, errmsg, ...(data && { data: exampleOf(data) }) }
          return [language === first ? name : `${name} (${language})`, { summary: errmsg, value }]
        })
      )
      return [
        status,
        {
          'x-response-description': alike.map((name) => `${outcomes[name].en} (${name})`).join('; '),
          'x-examples': Object.fromEntries(examples),
          type: 'object',
          required: ['errno', 'errmsg', ...(withData.length === alike.length ? ['data'] : [])],
          properties: {
            errno: { type: 'string', enum: [...new Set(alike.map((name) => outcomes[name].errno))] },
            errmsg: { type: 'string' },
            ...(withData[0] && { data: withData[0] })
          },
          headers: {
            'X-Request-Id': requestId,
            ...(alike.some((name) => 'retryAfterSeconds' in outcomes[name]) && { 'Retry-After': retryAfter }),
            ...(alike.some((name) => setCookie.has(name)) && { 'Set-Cookie': sessionCookie }),
            ...(alike.some((name) => replayable.has(name)) && { 'Idempotent-Replayed': replayed })
          }
        }
      ]
    })
  )
}

/** What the fields of a schema have as their examples. */
function exampleOf({ properties }: TSchema): object {
  return Object.fromEntries(
    Object.entries<TSchema>(properties ?? {}).map(([name, { examples }]) => [
      name,
      Array.isArray(examples) ? examples[0] : null
    ])
  )
}
