import { connect, type Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Reply } from './load.js'
import type { Server } from './system-under-test.js'

/** How long a client waits. Well above a lease. */
export const patienceMs = 10_000

/**
 * Sends sign-ups at a constant rate, whether or not earlier ones have been answered. A latency counts from the scheduled
 * start, so that it includes stalls of the server and of this process (no coordinated omission).
 *
 * @param bodies are sent in order, and from the start again when all were sent
 * @returns the replies in the order of the requests
 */
export async function openLoop(
  server: Server,
  perSecond: number,
  seconds: number,
  bodies: readonly string[]
): Promise<Reply[]> {
  const { hostname: host, port } = new URL(server.url)
  const address = { host, port: Number(port) }
  const idleSockets: Socket[] = []
  const replies: Promise<Reply>[] = []
  const count = Math.round(perSecond * seconds)
  const startAt = performance.now()
  while (replies.length < count) {
    const scheduledAt = startAt + (replies.length * 1_000) / perSecond
    const delayMs = scheduledAt - performance.now()
    if (delayMs > 0) await sleep(delayMs)
    else replies.push(signUp(address, idleSockets, bodies[replies.length % bodies.length] ?? '', scheduledAt))
  }
  const received = await Promise.all(replies)
  for (const socket of idleSockets) socket.destroy()
  return received
}

/**
 * Sends one sign-up on an idle connection, or on a new one. It reads and writes HTTP itself, because node:http would take
 * much of the CPU that the server under test needs. It relies on short replies with a Content-Length.
 */
function signUp(
  address: { host: string; port: number },
  idleSockets: Socket[],
  body: string,
  scheduledAt: number
): Promise<Reply> {
  let idle = idleSockets.pop()
  while (idle?.destroyed) idle = idleSockets.pop()
  // An error is followed by 'close'.
  const socket = idle ?? connect({ ...address, noDelay: true }).on('error', () => undefined)
  return new Promise((resolve) => {
    let text = ''
    function finish(status: number): void {
      clearTimeout(timeout)
      socket.off('data', read).off('close', fail)
      if (status > 0) idleSockets.push(socket)
      else socket.destroy()
      resolve({ status, ms: performance.now() - scheduledAt })
    }
    function read(chunk: Buffer): void {
      text += chunk.toString('latin1')
      const headEnd = text.indexOf('\r\n\r\n')
      if (headEnd < 0) return
      const length = Number(/content-length: (\d+)/i.exec(text)?.[1])
      if (text.length >= headEnd + 4 + length) finish(Number(text.slice('HTTP/1.1 '.length, 'HTTP/1.1 200'.length)))
    }
    const fail = () => finish(0)
    const timeout = setTimeout(fail, patienceMs)
    socket.on('data', read).once('close', fail)
    socket.write(
      `POST /api/v1.0/users HTTP/1.1\r\nHost: ${address.host}\r\nContent-Type: application/json\r\n` +
        `Content-Length: ${Buffer.byteLength(body)}\r\n\r\n${body}`
    )
  })
}
