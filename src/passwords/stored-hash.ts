/** `m` in KiB, `t`, `p`, the salt and the hash of a PHC string. */
const argon2 = /^\$argon2(?:id|i|d)\$(?:v=1[69]\$)?m=([1-9]\d*),t=([1-9]\d*),p=([1-9]\d*)\$([\w+/]{11,})\$([\w+/]{6,})$/

/** 256 MiB, and ten passes over them. More would take the memory of the instance, or a thread for seconds. */
const [memoryMaxKib, workMaxKib] = [262_144, 2_621_440]

/** Whether a text is base64 without padding, exactly as an encoder writes it. @node-rs/argon2 decodes no other form. */
const isCanonical = (text: string) => Buffer.from(text, 'base64').toString('base64').replace(/=+$/, '') === text

/**
 * Whether a password can be verified against a stored hash: a PHC string of argon2 that is safe to compute. Anything else, such
 * as `!`, or what a former system has left, matches no password.
 */
export function isVerifiable(storedHash: string): boolean {
  const [, m, t, p, salt = '', hash = ''] = argon2.exec(storedHash) ?? []
  const [memoryKib, work] = [Number(m), Number(m) * Number(t)]
  const isSafe = memoryKib <= memoryMaxKib && memoryKib >= 8 * Number(p) && work <= workMaxKib
  return isSafe && isCanonical(salt) && isCanonical(hash)
}
