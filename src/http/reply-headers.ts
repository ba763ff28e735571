import { randomUUID } from 'node:crypto'
import type { IncomingMessage } from 'node:http'
import fp from 'fastify-plugin'
import { maskMobiles } from '../telemetry/log.js'

/** The ids of gateways and tracers. */
const acceptedId = /^[\w.:/+=-]{1,128}$/

/** A mobile number, perhaps with separators in it. */
const spreadMobile = /1[^\da-z]*[3-9](?:[^\da-z]*\d){9}/gi

/** Returns the gateway's `X-Request-Id`, a mobile number in it masked, or a new id if it is not safe to log. */
export function requestIdOf({ headers }: Pick<IncomingMessage, 'headers'>): string {
  const id = headers['x-request-id']
  if (typeof id !== 'string' || !acceptedId.test(id)) return randomUUID()
  return maskMobiles(id, spreadMobile)
}

/**
 * What a browser may do with a reply that it opens as a page: nothing. It neither guesses another type, nor runs, loads or
 * frames anything, nor tells another site the URL. The two pages of this service have policies of their own.
 */
const browserHeaders = {
  'content-security-policy': "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; sandbox",
  'x-content-type-options': 'nosniff',
  'referrer-policy': 'no-referrer'
}

/** The headers of every reply. */
export const headersOfReply = (requestId: string) => ({
  'x-request-id': requestId,
  'cache-control': 'no-store',
  ...browserHeaders
})

/** Sends the headers of every reply. */
export const replyHeaders = fp(
  async (fastify) => {
    fastify.addHook('onRequest', (request, reply, done) => {
      reply.headers(headersOfReply(request.id))
      done()
    })
  },
  { fastify: '5.x', name: 'reply-headers' }
)
