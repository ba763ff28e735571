import { readFileSync } from 'node:fs'
import type { Redis } from 'ioredis'

/*
 * The rights of the service as docs/operating.md states them, so that tests run the service with what operators copy.
 */

const page = readFileSync(new URL('../docs/operating.md', import.meta.url), 'utf8')
const [, section = ''] = /^## Rights\n([\s\S]*?)^## /m.exec(page) ?? []
const [sql = '', acl = ''] = [...section.matchAll(/^```.*\n([\s\S]*?)^```$/gm)].map(([, text = '']) => text)
const [, , user = '', ...rules] = acl.trim().split(/\s+/)

/** Returns the statements that create the role `mobile_signup` in Postgres. */
export const postgresRole = (password: string): string => sql.replace('…', password)

/** The name of the user of the service in Redis. */
export const redisUser = user

/** Returns the rules of that user, as `ACL SETUSER` takes them. */
export const redisRules = (password: string): string[] => rules.map((rule) => rule.replace('PASSWORD', password))

/** Returns the commands and keys that a Redis has refused since its log was reset. */
export async function refusedObjects(admin: Redis): Promise<string[]> {
  const log = JSON.stringify(await admin.call('ACL', 'LOG'))
  const objects = [...log.matchAll(/"object"[,:]"([^"]+)"/g)].map(([, object = '']) => object)
  // Sent by ioredis to Redis 7.2 or later, and not needed. The page says so.
  return objects.filter((object) => object !== 'client|setinfo')
}
