/** Random numbers that a seed determines (mulberry32). */
export class SeededRandom {
  constructor(private state: number) {}

  /** Returns a number from 0 to less than 1. */
  next(): number {
    this.state = (this.state + 0x6d2b79f5) | 0
    let mixed = Math.imul(this.state ^ (this.state >>> 15), 1 | this.state)
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32
  }

  between(min: number, max: number): number {
    return min + this.next() * (max - min)
  }

  oneOf<T>(...values: [T, ...T[]]): T {
    return values[Math.floor(this.next() * values.length)] ?? values[0]
  }
}
