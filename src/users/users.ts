import fp from 'fastify-plugin'
import type { NamedStatement } from '../stores/postgres.js'

interface Users {
  /**
   * Adds a user, whose name is at first the mobile, in one statement: of any number of simultaneous calls for one
   * mobile exactly one adds the row.
   *
   * @param passwordHash a PHC string
   * @returns the new row's id, a 64-bit integer in decimal; undefined if the mobile is registered already
   */
  insert(mobile: string, passwordHash: string): Promise<string | undefined>
  find(mobile: string): Promise<User | undefined>
  /**
   * Gives a user a new password.
   *
   * @param former the PHC string that it is to replace, if it must not replace any other
   * @returns undefined if there was none to replace
   */
  setPassword(mobile: string, passwordHash: string, former?: string): Promise<Omit<User, 'passwordHash'> | undefined>
}

export interface User {
  /** A 64-bit integer in decimal. */
  id: string
  name: string
  /** A PHC string. */
  passwordHash: string
}

declare module 'fastify' {
  interface FastifyInstance {
    users: Users
  }
}

export const insertUser: NamedStatement = {
  name: 'insert_user',
  text: `INSERT INTO users (name, mobile, password_hash) VALUES ($1, $1, $2)
         ON CONFLICT (mobile) DO NOTHING RETURNING id`
}

const findUser: NamedStatement = {
  name: 'find_user',
  text: 'SELECT id, name, password_hash AS "passwordHash" FROM users WHERE mobile = $1'
}

const setPassword: NamedStatement = {
  name: 'set_password',
  text: `UPDATE users SET password_hash = $2 WHERE mobile = $1 AND password_hash = coalesce($3, password_hash)
         RETURNING id, name`
}

export const users = fp(
  async (fastify) => {
    fastify.decorate('users', {
      async insert(mobile, passwordHash) {
        const { rows } = await fastify.sql<{ id: string }>(insertUser, [mobile, passwordHash])
        return rows[0]?.id
      },
      async find(mobile) {
        const { rows } = await fastify.sql<User>(findUser, [mobile])
        return rows[0]
      },
      async setPassword(mobile, passwordHash, former) {
        const { rows } = await fastify.sql<Omit<User, 'passwordHash'>>(setPassword, [mobile, passwordHash, former])
        return rows[0]
      }
    } satisfies Users)
  },
  { fastify: '5.x', name: 'users', dependencies: ['postgres'] }
)
