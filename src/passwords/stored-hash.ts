import { pbkdf2, type ScryptOptions, scrypt, timingSafeEqual } from 'node:crypto'
import { promisify } from 'node:util'
import { verify as verifyArgon2 } from '@node-rs/argon2'
import { verify as verifyBcrypt } from '@node-rs/bcrypt'
import { argon2Max } from '../config/config.js'

/** Tells whether a password matches one stored hash. Every verifier works in libuv's pool. */
export type Verifier = (password: string) => Promise<boolean>

/** What a hash may cost at most, beside {@link argon2Max}. */
const pbkdf2IterationsMax = 2_000_000
const scryptMaxBytes = 128 * 2 ** 20
const bcryptCostMax = 14

/** Whether a text is base64 without padding, exactly as an encoder writes it. @node-rs/argon2 decodes no other form. */
const isCanonical = (text: string) => Buffer.from(text, 'base64').toString('base64').replace(/=+$/, '') === text

/** Compares a derived key with the stored one. */
const matching = (expected: Buffer, derive: (password: string) => Promise<Buffer>): Verifier => {
  return async (password) => timingSafeEqual(expected, await derive(password))
}

function pbkdf2Verifier(digest: string, iterations: number, salt: string, key: Buffer): Verifier | undefined {
  if (iterations > pbkdf2IterationsMax || key.length !== { sha256: 32, sha512: 64 }[digest]) return undefined
  return matching(key, (password) => promisify(pbkdf2)(password, salt, iterations, key.length, digest))
}

const deriveScrypt = promisify<string, string, number, ScryptOptions, Buffer>(scrypt)

function scryptVerifier([N, r, p]: [number, number, number], salt: string, key: Buffer): Verifier | undefined {
  const isPowerOfTwo = N > 1 && Number.isInteger(Math.log2(N))
  // RFC 7914, section 2, limits N.
  if (!isPowerOfTwo || N >= 2 ** (16 * r) || 128 * N * r * p > scryptMaxBytes) return undefined
  // Node.js also counts its buffers.
  const options = { N, r, p, maxmem: 2 * scryptMaxBytes }
  return matching(key, (password) => deriveScrypt(password, salt, key.length, options))
}

/**
 * The formats of stored hashes, each as a pattern and a function of its groups. The first is the one of this service and of other PHC
 * strings of argon2, the others were left by a former system.
 */
const formats: [RegExp, (hash: string, ...groups: string[]) => Verifier | undefined][] = [
  [
    // `m` in KiB, `t`, `p`, the salt and the hash.
    /^\$argon2(?:id|i|d)\$(?:v=1[69]\$)?m=([1-9]\d*),t=([1-9]\d*),p=([1-9]\d*)\$([\w+/]{11,})\$([\w+/]{6,})$/,
    (hash, m, t, p, ...texts) => {
      const [memoryKib, work] = [Number(m), Number(m) * Number(t)]
      const workMax = argon2Max.memoryKib * argon2Max.passes
      const isSafe = memoryKib <= argon2Max.memoryKib && memoryKib >= 8 * Number(p) && work <= workMax
      return isSafe && texts.every(isCanonical) ? (password) => verifyArgon2(hash, password) : undefined
    }
  ],
  [
    // werkzeug's generate_password_hash()
    /^pbkdf2:(sha256|sha512):([1-9]\d{0,6})\$([^$]+)\$((?:[\da-f]{2})+)$/,
    (_, digest = '', iterations, salt = '', key = '') =>
      pbkdf2Verifier(digest, Number(iterations), salt, Buffer.from(key, 'hex'))
  ],
  [
    /^scrypt:(\d{1,7}):([1-9]\d{0,3}):([1-9]\d{0,3})\$([^$]+)\$([\da-f]{128})$/,
    (_, N, r, p, salt = '', key = '') =>
      scryptVerifier([Number(N), Number(r), Number(p)], salt, Buffer.from(key, 'hex'))
  ],
  [
    // Django's PBKDF2PasswordHasher
    /^pbkdf2_(sha256)\$([1-9]\d{0,6})\$([^$]+)\$([\w+/]{43}=)$/,
    (_, digest = '', iterations, salt = '', key = '') =>
      pbkdf2Verifier(digest, Number(iterations), salt, Buffer.from(key, 'base64'))
  ],
  [
    /^\$2[aby]\$(\d\d)\$[./\w]{53}$/,
    (hash, cost) => {
      const isSafe = Number(cost) >= 4 && Number(cost) <= bcryptCostMax
      return isSafe ? (password) => verifyBcrypt(password, hash) : undefined
    }
  ]
]

/**
 * Returns the verifier of a stored hash. It is undefined for anything that matches no password: a locked user (`!`), an unknown format,
 * or a hash that costs too much.
 */
export function verifierOf(storedHash: string): Verifier | undefined {
  for (const [pattern, createVerifier] of formats) {
    const [hash, ...groups] = pattern.exec(storedHash) ?? []
    if (hash !== undefined) return createVerifier(hash, ...groups)
  }
  return undefined
}
