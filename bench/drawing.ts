/** One offered load and what became of it. Without any refusals their latencies are NaN. */
export interface LoadPoint {
  /** In parts of the capacity. */
  load: number
  offered: number
  goodput: number
  doneP50Ms: number
  doneP99Ms: number
  refusedP50Ms: number
  refusedP99Ms: number
}

const [width, height, left, right, top, bottom] = [720, 300, 60, 20, 40, 40]

/** A line of values over the loads, with its name at its end. */
interface Line {
  name: string
  colour: string
  value(point: LoadPoint): number
  dashed?: boolean
}

/** Goodput and latency over the offered load, one above the other, as SVG. */
export function drawOverload(points: readonly LoadPoint[]): string {
  const maxLoad = Math.max(...points.map(({ load }) => load))
  const x = (load: number) => left + (load / maxLoad) * (width - left - right)

  function panel(
    title: string,
    offset: number,
    lines: readonly Line[],
    ticks: readonly number[],
    y: (v: number) => number
  ) {
    const grid = ticks.map(
      (tick) =>
        `<path d="M${left} ${y(tick)}H${width - right}" stroke="#ddd"/>` +
        `<text x="${left - 8}" y="${y(tick) + 4}" text-anchor="end">${tick}</text>`
    )
    const loads = points.map(
      ({ load }) => `<text x="${x(load)}" y="${height - bottom + 18}" text-anchor="middle">${load}</text>`
    )
    const drawn = lines.map(({ name, colour, value, dashed }, n) => {
      const known = points.filter((point) => Number.isFinite(value(point)))
      const path = known.map((point) => `${x(point.load).toFixed(1)} ${y(value(point)).toFixed(1)}`).join('L')
      const dots = known.map(
        (p) => `<circle cx="${x(p.load).toFixed(1)}" cy="${y(value(p)).toFixed(1)}" r="3" fill="${colour}"/>`
      )
      const label = `<text x="${left + 10 + n * 165}" y="${top - 6}" fill="${colour}">${name}</text>`
      const dash = dashed ? ' stroke-dasharray="5 4"' : ''
      return `<path d="M${path}" fill="none" stroke="${colour}" stroke-width="2"${dash}/>${dashed ? '' : dots.join('')}${label}`
    })
    const body = [...grid, ...loads, ...drawn].join('')
    return `<g transform="translate(0 ${offset})"><text x="${left}" y="16" font-weight="bold">${title}</text>${body}</g>`
  }

  const plotHeight = height - top - bottom
  const maxRate = Math.ceil(Math.max(...points.map(({ offered }) => offered)) / 100) * 100
  const linear = (rate: number) => height - bottom - (rate / maxRate) * plotHeight
  const logarithmic = (ms: number) => height - bottom - (Math.log10(Math.max(ms, 1)) / 4) * plotHeight
  const goodput = panel(
    'Sign-ups/s over the offered load (in parts of the capacity)',
    0,
    [
      { name: 'completed', colour: '#1a7f37', value: ({ goodput }) => goodput },
      { name: 'offered', colour: '#888', value: ({ offered }) => offered, dashed: true }
    ],
    [0, maxRate / 2, maxRate],
    linear
  )
  const latency = panel(
    'Latency in milliseconds',
    height,
    [
      { name: 'sign-ups, p50', colour: '#1a7f37', value: ({ doneP50Ms }) => doneP50Ms },
      { name: 'sign-ups, p99', colour: '#7ac98d', value: ({ doneP99Ms }) => doneP99Ms },
      { name: 'refusals, p50', colour: '#cf222e', value: ({ refusedP50Ms }) => refusedP50Ms },
      { name: 'refusals, p99', colour: '#f0989d', value: ({ refusedP99Ms }) => refusedP99Ms }
    ],
    [1, 10, 100, 1_000, 10_000],
    logarithmic
  )
  return (
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${2 * height}" font-family="sans-serif" font-size="12">` +
    `<rect width="100%" height="100%" fill="#fff"/>${goodput}${latency}</svg>\n`
  )
}
