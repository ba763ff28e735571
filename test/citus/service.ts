import type { PrivateStores } from '../../testkit/private-stores.js'
import { ServerProcess } from '../../testkit/server-process.js'
import type { Node } from './cluster.js'

/** Hashes that take so little time that the database matters. */
const cheapHash = { HASH_MEMORY_KIB: '1024', HASH_PASSES: '1' }

/** The built service on a node. */
export interface Service {
  readonly url: string
  readonly process: ServerProcess
  stop(): Promise<void>
}

export async function startService(
  node: Node,
  stores: PrivateStores,
  env: Record<string, string> = {}
): Promise<Service> {
  const process = ServerProcess.start(undefined, {
    env: { ...stores.environment, ...cheapHash, DATABASE_URL: node.url, ...env }
  })
  return {
    url: await process.url(),
    process,
    async stop() {
      await process.stop()
      process.dispose()
    }
  }
}
