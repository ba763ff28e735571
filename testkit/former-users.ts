import { pbkdf2Sync, randomBytes, scryptSync } from 'node:crypto'
import { hashSync as argon2 } from '@node-rs/argon2'
import { hashSync as bcrypt } from '@node-rs/bcrypt'

/** How other systems hash a password, with a low cost. */
const kinds: ((password: string, salt: string) => string)[] = [
  function werkzeugPbkdf2(password, salt) {
    return `pbkdf2:sha256:1000$${salt}$${pbkdf2Sync(password, salt, 1000, 32, 'sha256').toString('hex')}`
  },
  function werkzeugScrypt(password, salt) {
    return `scrypt:1024:8:1$${salt}$${scryptSync(password, salt, 64, { N: 1024, r: 8, p: 1 }).toString('hex')}`
  },
  function djangoPbkdf2(password, salt) {
    return `pbkdf2_sha256$1000$${salt}$${pbkdf2Sync(password, salt, 1000, 32, 'sha256').toString('base64')}`
  },
  (password) => bcrypt(password, 4),
  function argon2i(password) {
    return argon2(password, { algorithm: 1, memoryCost: 128, timeCost: 2 })
  }
]

/** So many passwords of each kind are hashed. More users share them. */
const passwordsOfKind = 20

/** Returns users of another system: five of them have hashes of five kinds, and so on. */
export function formerUsers(count: number) {
  const logins = Array.from({ length: kinds.length * passwordsOfKind }, (_, i) => {
    const password = `former password ${i}`
    return { password, password_hash: kinds[i % kinds.length]?.(password, randomBytes(8).toString('hex')) ?? '' }
  })
  return Array.from({ length: count }, (_, i) => {
    return { mobile: `${13_700_000_000 + i}`, password: '', password_hash: '', ...logins[i % logins.length] }
  })
}
