import { compile } from '@fastify/proxy-addr'
import fp from 'fastify-plugin'
import type { Config } from '../config/config.js'
import { sampler } from '../telemetry/sampled-warnings.js'
import { bareAddress } from './network.js'

/** Returns a function that tells whether an address is that of a proxy that `TRUST_PROXY` names. */
export function trustedProxies({ trustProxy }: Pick<Config, 'trustProxy'>) {
  const isInRange = compile([...trustProxy])
  return (address = ''): boolean => isInRange(bareAddress(address), 0)
}

/** Logs, at most once a minute each, an X-Forwarded-For that does not tell the client's address. */
export const forwardedFor = fp<{ config: Config }>(
  async (fastify, { config }) => {
    const isTrusted = trustedProxies(config)
    const sample = sampler(1, 60_000)
    fastify.addHook('onRequest', (request, _reply, done) => {
      if (request.headers['x-forwarded-for'] !== undefined) {
        const peer = request.socket.remoteAddress
        const fault = isTrusted(peer)
          ? isTrusted(request.ip) &&
            'every address of X-Forwarded-For is in TRUST_PROXY, so a client may have chosen its own'
          : 'X-Forwarded-For is ignored: TRUST_PROXY does not name this peer'
        if (fault && sample(fault) !== undefined) request.log.warn({ peer }, fault)
      }
      done()
    })
  },
  { fastify: '5.x', name: 'forwarded-for' }
)
