import { randomUUID } from 'node:crypto'
import type { IncomingMessage } from 'node:http'
import fp from 'fastify-plugin'

/** The ids of gateways and tracers, but none that contains a mobile number: the id is logged. */
const acceptedId = /^(?!.*(?<!\d)1[3-9]\d{9}(?!\d))[\w.:/+=-]{1,128}$/

/** Returns the gateway's `X-Request-Id` if it is safe to log, else a new id. */
export function requestIdOf({ headers }: Pick<IncomingMessage, 'headers'>): string {
  const id = headers['x-request-id']
  return typeof id === 'string' && acceptedId.test(id) ? id : randomUUID()
}

/** Sends `X-Request-Id` with every reply. */
export const requestIds = fp(
  async (fastify) => {
    fastify.addHook('onRequest', (request, reply, done) => {
      reply.header('x-request-id', request.id)
      done()
    })
  },
  { fastify: '5.x', name: 'request-ids' }
)
