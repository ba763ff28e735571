import type { FastifyRequest } from 'fastify'

/** The attributes of a cookie that only this service reads. */
export const cookieAttributes = (secure: boolean) => ({ path: '/', httpOnly: true, sameSite: 'lax', secure }) as const

/** With __Host- browsers refuse a cookie from a subdomain or over plain HTTP (RFC 6265bis, section 4.1.3.2). */
export const cookieNameOf = (name: string, secure: boolean) => (secure ? `__Host-${name}` : name)

/**
 * Returns the values of all cookies with a name: a browser sends one for each path and domain for which somebody has set one,
 * and @fastify/cookie keeps the first. At most 20, because each costs an HMAC, and a header has room for two thousand.
 */
export function cookieValues({ headers: { cookie = '' }, server }: FastifyRequest, name: string): string[] {
  const pairs = cookie.split(';').filter((pair) => pair.includes(name))
  return pairs.flatMap((pair) => server.parseCookie(pair)[name] ?? []).slice(0, 20)
}
