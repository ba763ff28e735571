import { once } from 'node:events'
import { connect, createServer, type Server, type Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { freePort } from '../dev/embedded-stores.js'

/** What happens to one request, and to what comes after it. */
export type Fault =
  /** The request is forwarded late. */
  | { kind: 'delay'; ms: number }
  /** The request, and what comes after it on its connection, is forwarded when the promise resolves. */
  | { kind: 'hold'; until: Promise<unknown> }
  /** From this request on, nothing is forwarded on any connection. */
  | { kind: 'stall' }
  /** All connections are closed, the request is not forwarded, and new connections are refused. */
  | { kind: 'refuse' }
  /** The connection is reset and the request is not forwarded. New connections work. */
  | { kind: 'reset' }
  /** The connection is closed after so many bytes of the reply. */
  | { kind: 'cut'; bytes: number }
  /** The request is forwarded, its reply is dropped, and the connection stays open. */
  | { kind: 'drop reply' }
  /** In the reply a text is replaced by another one of the same length. */
  | { kind: 'replace'; from: string; to: string }

interface Connection {
  client: Socket
  server: Socket
  /** Gets the next bytes of a reply in place of the client. */
  takeReply: ((reply: Buffer) => void) | undefined
}

interface ArmedFault {
  needle: string
  fault: Fault
  /** How many more requests with the needle are forwarded before the fault happens. */
  skip: number
  onStruck: () => void
}

/** Resets a connection. One that is ending is only closed: Node.js 20 cannot reset it, and the process would never exit. */
function reset(socket: Socket): void {
  if (socket.writableEnded) socket.destroy()
  else socket.resetAndDestroy()
}

/** A TCP proxy in front of a store that causes faults on demand. */
export class FaultProxy {
  /** The number of connections since the start. */
  connectionCount = 0
  private readonly connections = new Set<Connection>()
  private readonly armedFaults: ArmedFault[] = []
  private isStalled = false
  private isHanging = false

  private constructor(
    private target: URL,
    private readonly server: Server,
    private readonly port: number
  ) {
    server.on('connection', (client) => this.forward(client))
  }

  /** @param url of the store */
  static async open(url: string): Promise<FaultProxy> {
    const [target, server] = [new URL(url), createServer()]
    // Not an ephemeral port: nobody else may take it while the proxy refuses connections.
    const port = await freePort()
    await once(server.listen(port, '127.0.0.1'), 'listening')
    return new FaultProxy(target, server, port)
  }

  /** The URL of the store through the proxy. */
  get url(): string {
    const url = new URL(this.target)
    url.port = `${this.port}`
    return url.href
  }

  /**
   * Arms a fault for a coming request whose bytes contain the needle.
   *
   * @param skip how many such requests are forwarded first
   * @returns a promise that resolves when the fault happens
   */
  strike(needle: string, fault: Fault, skip = 0): Promise<void> {
    return new Promise((onStruck) => this.armedFaults.push({ needle, fault, skip, onStruck }))
  }

  /** Causes a fault of all new connections, now. Open ones stay. A connection that hangs is accepted, and nothing more. */
  applyToNew(kind: 'refuse' | 'hang'): void {
    if (kind === 'hang') this.isHanging = true
    else this.server.close()
  }

  /** Causes a fault of all connections, now. */
  async apply(kind: 'stall' | 'refuse' | 'reset'): Promise<void> {
    const closed = kind === 'refuse' && once(this.server.close(), 'close')
    if (kind === 'stall') this.isStalled = true
    else this.closeConnections()
    await closed
  }

  /** Forwards new connections to another server, as an address does after a failover. Open connections stay where they are. */
  retarget(url: string): void {
    this.target = new URL(url)
  }

  /** Forwards again. What was lost in a stall stays lost, as after a reboot. */
  async heal(): Promise<void> {
    if (this.isStalled) this.closeConnections()
    this.isStalled = false
    this.isHanging = false
    if (!this.server.listening) await once(this.server.listen(this.port, '127.0.0.1'), 'listening')
  }

  async close(): Promise<void> {
    this.closeConnections()
    if (this.server.listening) await once(this.server.close(), 'close')
  }

  private closeConnections(): void {
    for (const { client, server } of this.connections) {
      reset(client)
      server.destroy()
    }
  }

  private forward(client: Socket): void {
    this.connectionCount++
    const server = this.isHanging ? client : connect(Number(this.target.port), this.target.hostname)
    const connection: Connection = { client, server, takeReply: undefined }
    this.connections.add(connection)
    for (const [socket, other] of [
      [client, server],
      [server, client]
    ] as const) {
      // An error is followed by 'close'.
      socket.setNoDelay().on('error', () => undefined)
      socket.once('close', () => {
        other.destroy()
        this.connections.delete(connection)
      })
    }
    if (this.isHanging) return
    client.on('data', (request) => this.forwardRequest(connection, request))
    server.on('data', (reply) => {
      const { takeReply = (bytes: Buffer) => client.write(bytes) } = connection
      connection.takeReply = undefined
      if (!this.isStalled) takeReply(reply)
    })
  }

  private async forwardRequest(connection: Connection, request: Buffer): Promise<void> {
    const { client, server } = connection
    const index = this.armedFaults.findIndex(({ needle }) => request.includes(needle))
    const armed = this.armedFaults[index]
    const struck = armed !== undefined && armed.skip-- === 0 ? armed : undefined
    if (struck !== undefined) this.armedFaults.splice(index, 1)
    struck?.onStruck()
    const fault = struck?.fault
    switch (fault?.kind) {
      case 'delay':
        await sleep(fault.ms)
        break
      case 'hold':
        client.pause()
        await fault.until
        client.resume()
        break
      case 'stall':
      case 'refuse':
        await this.apply(fault.kind)
        break
      case 'reset':
        reset(client)
        return
      case 'cut':
        connection.takeReply = (reply) => client.write(reply.subarray(0, fault.bytes), () => client.destroy())
        break
      case 'replace':
        connection.takeReply = (reply) => client.write(reply.toString('latin1').replace(fault.from, fault.to), 'latin1')
        break
      case 'drop reply':
        connection.takeReply = () => undefined
    }
    if (!this.isStalled) server.write(request)
  }
}
