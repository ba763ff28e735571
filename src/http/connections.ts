import type { IncomingMessage, ServerResponse } from 'node:http'
import type { Socket } from 'node:net'
import fp from 'fastify-plugin'

/** The requests of one connection that are not answered yet, in the order in which Node answers them. */
type Unanswered = Map<IncomingMessage, ServerResponse>

interface Connections {
  /** All open connections. Those that are idle have no request. */
  readonly unanswered: ReadonlyMap<Socket, Unanswered>
  /** Waits until every request that has arrived completely on this connection is answered. */
  untilAnswered(socket: Socket): Promise<void>
  /** From now on the last reply on every connection says `Connection: close`. */
  closeAfterReplies(): void
}

declare module 'fastify' {
  interface FastifyInstance {
    connections: Connections
  }
}

/** More than any gateway sends before it reads. */
const unansweredMax = 100

/** How long a client may take to read a reply. */
const readingTimeoutMs = 30_000

/** How often the connections are checked for clients that do not read. */
const checkIntervalMs = 1_000

/** Connections that http/bad-requests.ts closes with a refusal: nothing that follows on them is answered. */
export const refused = new WeakSet<Socket>()

/** Follows the requests of every connection, and closes those that cost too much. */
export const connections = fp(
  async (fastify) => {
    const { server } = fastify
    const unanswered = new Map<Socket, Unanswered>()
    let isClosing = false

    // http/bad-requests.ts counts the lines. By default Node drops some without a word, such as the gateway's X-Forwarded-For.
    server.maxHeadersCount = 0
    server.on('connection', (socket: Socket) => {
      if (unanswered.has(socket)) return
      unanswered.set(socket, new Map())
      socket.once('close', () => unanswered.delete(socket))
    })
    // Before Fastify's listener.
    server.prependListener('request', (request: IncomingMessage, response: ServerResponse) => {
      const { socket } = request
      const requests = unanswered.get(socket)
      if (requests === undefined || refused.has(socket)) return
      if (requests.size < unansweredMax) {
        requests.set(request, response)
        response.once('close', () => requests.delete(request))
        if (isClosing) announceClose(requests)
      } else {
        // Node pauses a client that does not read, but first parses the 64 KiB that it has received: 2,000 requests. A listener
        // takes what follows away from the parser. Without one it is dropped.
        socket.on('data', () => undefined).removeAllListeners('data')
        // The first 100 are answered, then http/bad-requests.ts refuses the connection.
        server.emit('clientError', { code: 'TOO_MANY_UNANSWERED' }, socket)
      }
    })
    fastify.addHook('onRequest', (request, _reply, done) => {
      // One that follows a refusal is dropped. A request of `inject` has no connection.
      if (unanswered.get(request.raw.socket)?.has(request.raw) !== false) done()
    })

    const unreadSince = new WeakMap<ServerResponse, number>()
    const check = setInterval(() => {
      const now = performance.now()
      for (const [socket, requests] of unanswered) {
        const [response] = requests.values()
        if (!response?.headersSent) continue
        const since = unreadSince.get(response) ?? now
        unreadSince.set(response, since)
        if (now - since >= readingTimeoutMs) socket.destroy()
      }
    }, checkIntervalMs).unref()
    server.once('close', () => clearInterval(check))

    // Without this listener Node answers a request with an Upgrade, but drops what follows it in the same read. So the same
    // bytes are parsed again, without the Upgrade, when the requests before them are answered.
    server.on('upgrade', async (request: IncomingMessage, socket: Socket, head: Buffer) => {
      const { method, url, httpVersion, rawHeaders } = request
      const lines = [`${method} ${url} HTTP/${httpVersion}`]
      for (const [index, name] of rawHeaders.entries()) {
        if (index % 2 === 0 && name.toLowerCase() !== 'upgrade') lines.push(`${name}: ${rawHeaders[index + 1]}`)
      }
      socket.unshift(Buffer.concat([Buffer.from(`${lines.join('\r\n')}\r\n\r\n`, 'latin1'), head]))
      // Node has removed its listeners. Without one for `error`, a reset ends the process.
      const ignore = () => undefined
      socket.on('error', ignore)
      await untilAnswered(socket)
      if (socket.destroyed || refused.has(socket)) return
      socket.off('error', ignore).setTimeout(0)
      server.emit('connection', socket)
    })

    async function untilAnswered(socket: Socket): Promise<void> {
      for (const [request, response] of unanswered.get(socket) ?? []) {
        if (request.complete) await new Promise((resolve) => response.once('close', resolve))
      }
    }

    function announceClose(requests: Unanswered): void {
      const open = [...requests.values()].filter(({ headersSent }) => !headersSent)
      // What follows a reply with `Connection: close` would not be sent.
      for (const response of open) response.setHeader('connection', response === open.at(-1) ? 'close' : 'keep-alive')
    }

    fastify.decorate('connections', {
      unanswered,
      untilAnswered,
      closeAfterReplies() {
        isClosing = true
        for (const requests of unanswered.values()) announceClose(requests)
      }
    } satisfies Connections)
  },
  { fastify: '5.x', name: 'connections' }
)
