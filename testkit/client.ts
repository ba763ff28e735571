import type { FastifyInstance } from 'fastify'

/** An application in this process, or the URL of a service. */
export type Target = FastifyInstance | string

/** The parts of a reply that tests look at. `app.inject()` returns them, too. */
export interface Reply {
  statusCode: number
  headers: Record<string, string | string[] | number | undefined>
  body: string
  cookies: readonly { name: string; value: string }[]
  json(): Envelope
}

export interface Envelope {
  errno: string
  errmsg: string
  /** Absent in replies without data. */
  data: { user_id: string; name: string; mobile: string; session: boolean; ticket: string }
}

export interface RequestOptions {
  headers?: Record<string, string>
  /** The client's address. Only for an application in this process. */
  from?: string
  /** Only for a URL. */
  signal?: AbortSignal
}

type Method = 'GET' | 'POST' | 'PUT' | 'DELETE'

const apiPrefix = '/api/v1.0'

/** A client of the API. A body that is a string or a buffer is sent as it is, with the type JSON. */
export function client(target: Target) {
  async function send(method: Method, path: string, body: unknown, options: RequestOptions = {}): Promise<Reply> {
    const { from: remoteAddress = '127.0.0.1', headers, signal = null } = options
    const encoded = typeof body === 'string' || Buffer.isBuffer(body) ? body : JSON.stringify(body)
    const type = encoded !== undefined && { 'content-type': 'application/json' }
    const request = { method, headers: { ...type, ...headers } }
    const url = `${apiPrefix}${path}`
    if (typeof target === 'string') return fetchReply(`${target}${url}`, { ...request, body: encoded, signal })
    return target.inject({ ...request, url, payload: encoded, remoteAddress })
  }
  return {
    sendCode: (mobile: unknown, { purpose, ...options }: RequestOptions & { purpose?: unknown } = {}) =>
      send('POST', '/sms_codes', { mobile, purpose }, options),
    signUp: (body: unknown, options?: RequestOptions) => send('POST', '/users', body, options),
    resetPassword: (body: unknown, options?: RequestOptions) => send('PUT', '/users/password', body, options),
    logIn: (body: unknown, options?: RequestOptions) => send('POST', '/sessions', body, options),
    deleteAccount: (body: unknown, options?: RequestOptions) => send('DELETE', '/users', body, options),
    whoAmI: (cookie: string) => send('GET', '/session', undefined, { headers: { cookie } }),
    logOut: (cookie: string, query = '') => send('DELETE', `/session${query}`, undefined, { headers: { cookie } })
  }
}

async function fetchReply(url: string, request: RequestInit): Promise<Reply> {
  const response = await fetch(url, request)
  const text = await response.text()
  const setCookies = response.headers.getSetCookie()
  return {
    statusCode: response.status,
    headers: { ...Object.fromEntries(response.headers), ...(setCookies.length > 0 && { 'set-cookie': setCookies }) },
    body: text,
    cookies: setCookies.map((cookie) => {
      const [, name = '', value = ''] = /^([^=]*)=([^;]*)/.exec(cookie) ?? []
      return { name, value }
    }),
    json: () => JSON.parse(text)
  }
}

/** Returns the status and the errno of a reply. */
export const statusAndErrno = (reply: Reply): [number, string] => [reply.statusCode, reply.json().errno]
