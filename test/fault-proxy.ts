import { once } from 'node:events'
import { type AddressInfo, connect, createServer, type Server, type Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'

/** What happens to the exchange that is struck, and to what comes after it. */
export type Fault =
  /** The request passes late. */
  | { kind: 'delay'; ms: number }
  /** Nothing passes any more on any connection, from the request on. */
  | { kind: 'stall' }
  /** Every connection ends, the request unseen, and new ones are refused. */
  | { kind: 'refuse' }
  /** The connection ends, the request unseen; new ones are served. */
  | { kind: 'reset' }
  /** The connection ends after so many bytes of the reply. */
  | { kind: 'cut'; bytes: number }
  /** The request passes, its reply never comes; the connection lives on. */
  | { kind: 'drop reply' }

/** One connection through the proxy. */
interface Pair {
  client: Socket
  server: Socket
  /** What is left to do to the next bytes of a reply. */
  onReply: 'pass' | 'drop' | { cutAfter: number }
}

/** A TCP proxy in front of a store, which strikes on command. */
export class FaultProxy {
  private readonly pairs = new Set<Pair>()
  private readonly strikes: { needle: string; fault: Fault; skip: number; struck: () => void }[] = []
  private stalled = false
  /** Connections accepted so far. */
  accepted = 0

  private constructor(
    private readonly target: URL,
    private readonly server: Server,
    private readonly port: number
  ) {
    server.on('connection', (client) => this.relay(client))
  }

  /** @param url of the store */
  static async open(url: string): Promise<FaultProxy> {
    const server = createServer()
    await once(server.listen(0, '127.0.0.1'), 'listening')
    return new FaultProxy(new URL(url), server, (server.address() as AddressInfo).port)
  }

  /** The store's URL, by way of the proxy. */
  get url(): string {
    const url = new URL(this.target)
    url.port = `${this.port}`
    return url.href
  }

  /**
   * Arms a fault for the first request from now on that holds the needle, after so many that do.
   *
   * @returns when it has struck
   */
  strike(needle: string, fault: Fault, skip = 0): Promise<void> {
    return new Promise((struck) => this.strikes.push({ needle, fault, skip, struck }))
  }

  /** A fault of all connections, at once. */
  async apply(kind: 'stall' | 'refuse' | 'reset'): Promise<void> {
    if (kind === 'stall') this.stalled = true
    else {
      const closed = kind === 'refuse' && once(this.server.close(), 'close')
      this.endAll()
      await closed
    }
  }

  /** Serves as before. What a stall has swallowed does not come back, as after a reboot. */
  async heal(): Promise<void> {
    if (this.stalled) this.endAll()
    this.stalled = false
    if (!this.server.listening) await once(this.server.listen(this.port, '127.0.0.1'), 'listening')
  }

  async close(): Promise<void> {
    this.endAll()
    if (this.server.listening) await once(this.server.close(), 'close')
  }

  private endAll(): void {
    for (const { client, server } of this.pairs) {
      client.resetAndDestroy()
      server.destroy()
    }
  }

  private relay(client: Socket): void {
    this.accepted++
    const server = connect(Number(this.target.port), this.target.hostname)
    const pair: Pair = { client, server, onReply: 'pass' }
    this.pairs.add(pair)
    for (const [socket, other] of [
      [client, server],
      [server, client]
    ] as const) {
      // An error is followed by 'close'.
      socket.setNoDelay().on('error', () => undefined)
      socket.once('close', () => {
        other.destroy()
        this.pairs.delete(pair)
      })
    }
    client.on('data', (request) => this.onRequest(pair, request))
    server.on('data', (reply) => this.onReply(pair, reply))
  }

  private async onRequest(pair: Pair, request: Buffer): Promise<void> {
    const n = this.strikes.findIndex((strike) => request.includes(strike.needle) && strike.skip-- === 0)
    const [strike] = n < 0 ? [] : this.strikes.splice(n, 1)
    strike?.struck()
    switch (strike?.fault.kind) {
      case 'delay':
        await sleep(strike.fault.ms)
        break
      case 'stall':
      case 'refuse':
        await this.apply(strike.fault.kind)
        break
      case 'reset':
        pair.client.resetAndDestroy()
        return
      case 'cut':
        pair.onReply = { cutAfter: strike.fault.bytes }
        break
      case 'drop reply':
        pair.onReply = 'drop'
    }
    if (!this.stalled) pair.server.write(request)
  }

  private onReply(pair: Pair, reply: Buffer): void {
    const { onReply } = pair
    pair.onReply = 'pass'
    if (this.stalled || onReply === 'drop') return
    if (onReply === 'pass') pair.client.write(reply)
    else pair.client.write(reply.subarray(0, onReply.cutAfter), () => pair.client.destroy())
  }
}
