import { createHash } from 'node:crypto'
import { readFile } from 'node:fs/promises'
import type { FastifyPluginAsync } from 'fastify'
import type { Config } from '../config/config.js'

/** In the sources, also for the built service: the embedded mode runs from a checkout. */
const file = new URL('../../src/dev/sign-up-page.html', import.meta.url)

/** A newcomer's first sight of the service: a page at `/` on which to sign up. */
export const signUpPage: FastifyPluginAsync<Pick<Config, 'apiPrefix' | 'smsResendS'>> = async (fastify, config) => {
  const template = await readFile(file, 'utf8')
  const page = template.replace('{{api}}', config.apiPrefix).replace('{{resendS}}', `${config.smsResendS}`)
  const hashOf = (tag: string) => {
    const [, content = ''] = new RegExp(`<${tag}[^>]*>(.*?)</${tag}>`, 's').exec(page) ?? []
    return `'sha256-${createHash('sha256').update(content).digest('base64')}'`
  }
  const policy = [
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    `script-src ${hashOf('script')}; style-src ${hashOf('style')}; img-src data:; connect-src 'self'`
  ].join('; ')

  fastify.get('/', async (_request, reply) =>
    reply
      .type('text/html; charset=utf-8')
      .header('content-security-policy', policy)
      .header('cache-control', 'no-store')
      .header('x-content-type-options', 'nosniff')
      .send(page)
  )
}
