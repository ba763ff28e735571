import { once } from 'node:events'
import type { Server } from 'node:http'
import type { Server as TcpServer } from 'node:net'
import type { Test } from 'tap'
import { freePort } from '../dev/embedded-stores.js'

/** Lets a server listen on loopback. @returns its URL, without a slash at the end */
export async function listenOnLoopback(server: TcpServer): Promise<string> {
  const port = await freePort()
  await once(server.listen(port, '127.0.0.1'), 'listening')
  return `http://127.0.0.1:${port}`
}

/** Lets a server of a test listen on loopback, and closes it after the test. @returns its URL, without a slash at the end */
export function listen(t: Test, server: Server): Promise<string> {
  t.teardown(() => {
    server.closeAllConnections()
    server.close()
  })
  return listenOnLoopback(server)
}
