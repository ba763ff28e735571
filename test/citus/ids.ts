import { type Check, check, print } from './checks.js'
import type { Node } from './cluster.js'

const usersPerNode = 20_000

/** Where the mobiles of each node start. */
const firstMobile = 13_000_000_000

/** Inserts users in bulk through all nodes at the same time. No constraint finds two with the same id. */
export async function checkIds(nodes: readonly [Node, ...Node[]]): Promise<Check[]> {
  print('\nids of users that are inserted through all nodes at the same time')
  await Promise.all(
    nodes.map((node, index) =>
      node.query(
        `INSERT INTO users (name, mobile, password_hash)
           SELECT mobile, mobile, 'x' FROM (SELECT ($1::bigint + n)::text AS mobile FROM generate_series(1, $2::int) n) m`,
        [firstMobile + index * usersPerNode, usersPerNode]
      )
    )
  )
  const [node] = nodes
  const [counts] = await node.query<{ users: number; ids: number; groups: number; late: number }>(
    `SELECT count(*)::int AS users, count(DISTINCT id)::int AS ids, count(DISTINCT id >> 16 & 63)::int AS groups,
            count(*) FILTER (WHERE abs((id >> 22) + 1704067200000 - extract(epoch FROM created_at) * 1000) > 60000)::int
              AS late
       FROM users`
  )
  await node.query('TRUNCATE users')
  const { users = 0, ids = 0, groups, late } = counts ?? {}
  return [
    check(`${users} users have ${ids} different ids`, users === nodes.length * usersPerNode && ids === users),
    check(`their ids name ${groups} nodes, and the time of the INSERT`, groups === nodes.length && late === 0)
  ]
}
