import fp from 'fastify-plugin'
import type { NamedStatement } from '../stores/postgres.js'

export interface User {
  /** A 64-bit integer in decimal. */
  id: string
  name: string
  /** A PHC string. */
  passwordHash: string
}

interface Users {
  /**
   * Adds a user, whose name is the mobile at first, in one statement. Of simultaneous calls for one mobile exactly one adds
   * the row.
   *
   * @param passwordHash a PHC string
   * @returns the id of the new row, or undefined if the mobile is registered
   */
  insert(mobile: string, passwordHash: string): Promise<string | undefined>
  find(mobile: string): Promise<User | undefined>
  /**
   * Replaces the password of a user.
   *
   * @param formerHash if given, only this PHC string is replaced
   * @returns undefined if no row was changed
   */
  setPassword(
    mobile: string,
    passwordHash: string,
    formerHash?: string
  ): Promise<Omit<User, 'passwordHash'> | undefined>
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

/** The users table. */
export const users = fp(
  async (fastify) => {
    fastify.decorate('users', {
      async insert(mobile, passwordHash) {
        const { rows } = await fastify.postgres.query<{ id: string }>(insertUser, [mobile, passwordHash])
        return rows[0]?.id
      },
      async find(mobile) {
        const { rows } = await fastify.postgres.query<User>(findUser, [mobile])
        return rows[0]
      },
      async setPassword(mobile, passwordHash, formerHash) {
        const values = [mobile, passwordHash, formerHash]
        const { rows } = await fastify.postgres.query<Omit<User, 'passwordHash'>>(setPassword, values)
        return rows[0]
      }
    } satisfies Users)
  },
  { fastify: '5.x', name: 'users', dependencies: ['postgres'] }
)
