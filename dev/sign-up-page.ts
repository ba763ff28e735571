import { createHash } from 'node:crypto'
import { readFile } from 'node:fs/promises'
import type { FastifyPluginAsync } from 'fastify'
import type { Config } from '../src/config/config.js'

/** A page at `/` on which a newcomer signs up, logs in by code and deletes the account. */
export const signUpPage: FastifyPluginAsync<{ config: Config }> = async (fastify, { config }) => {
  const template = await readFile(new URL('./sign-up-page.html', import.meta.url), 'utf8')
  const page = template.replace('{{api}}', config.apiPrefix).replace('{{resendS}}', `${config.smsResendS}`)
  const hashOf = (tag: string) => {
    const [, content = ''] = new RegExp(`<${tag}[^>]*>(.*?)</${tag}>`, 's').exec(page) ?? []
    return `'sha256-${createHash('sha256').update(content).digest('base64')}'`
  }
  const contentSecurityPolicy = [
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    `script-src ${hashOf('script')}; style-src ${hashOf('style')}; img-src data:; connect-src 'self'`
  ].join('; ')

  fastify.get('/', async (_request, reply) =>
    reply.type('text/html; charset=utf-8').header('content-security-policy', contentSecurityPolicy).send(page)
  )
}
