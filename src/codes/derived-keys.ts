import { hkdfSync } from 'node:crypto'

/**
 * Derives a key of 32 bytes from each secret, in the order of the secrets.
 *
 * @param purpose separates the keys of different uses; with another text, nothing made before can be verified
 */
export function deriveKeys(
  [newest, ...former]: readonly [string, ...string[]],
  purpose: string
): [Buffer, ...Buffer[]] {
  const derive = (secret: string) => Buffer.from(hkdfSync('sha256', secret, '', purpose, 32))
  return [derive(newest), ...former.map(derive)]
}
