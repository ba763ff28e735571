import type { LoadPoint } from './offered-load.js'

const [width, panelHeight] = [720, 300]

/** The space between the edges of a panel and its plot. */
const [left, right, top, bottom] = [60, 20, 40, 40]

/** The decades of the latency axis, from 1 ms to 10 s. */
const latencyDecades = 4

interface Curve {
  name: string
  colour: string
  points: readonly LoadPoint[]
  value(point: LoadPoint): number
  isDashed?: boolean
}

interface Panel {
  title: string
  curves: readonly Curve[]
  ticks: readonly number[]
  /** Returns the height of a value, as a fraction of the plot's height. */
  scale(value: number): number
}

/** Returns an SVG with two panels over the offered load: goodput above, latency below. */
export function drawOverloadChart(points: readonly LoadPoint[], plainPoints: readonly LoadPoint[]): string {
  const maxRate = Math.ceil(Math.max(...points.map(({ offered }) => offered)) / 100) * 100
  const goodput: Panel = {
    title: 'Sign-ups/s over the offered load (in parts of the capacity)',
    curves: [
      { name: 'completed', colour: '#1a7f37', points, value: ({ goodput }) => goodput },
      { name: 'by the plain handler', colour: '#9a6700', points: plainPoints, value: ({ goodput }) => goodput },
      { name: 'offered', colour: '#888', points, value: ({ offered }) => offered, isDashed: true }
    ],
    ticks: [0, maxRate / 2, maxRate],
    scale: (rate) => rate / maxRate
  }
  const latency: Panel = {
    title: 'Latency in milliseconds',
    curves: [
      { name: 'sign-ups, p50', colour: '#1a7f37', points, value: ({ doneP50Ms }) => doneP50Ms },
      { name: 'sign-ups, p99', colour: '#7ac98d', points, value: ({ doneP99Ms }) => doneP99Ms },
      { name: 'refusals, p99', colour: '#cf222e', points, value: ({ refusedP99Ms }) => refusedP99Ms },
      { name: 'plain handler, p50', colour: '#9a6700', points: plainPoints, value: ({ doneP50Ms }) => doneP50Ms }
    ],
    ticks: [1, 10, 100, 1_000, 10_000],
    scale: (ms) => Math.log10(Math.max(ms, 1)) / latencyDecades
  }
  const box = `viewBox="0 0 ${width} ${2 * panelHeight}" font-family="sans-serif" font-size="12"`
  const panels = `${drawPanel(goodput, 0)}${drawPanel(latency, panelHeight)}`
  return `<svg xmlns="http://www.w3.org/2000/svg" ${box}><rect width="100%" height="100%" fill="#fff"/>${panels}</svg>\n`
}

function drawPanel({ title, curves, ticks, scale }: Panel, offset: number): string {
  const loads = (curves[0]?.points ?? []).map(({ load }) => load)
  const x = (load: number) => left + (load / Math.max(...loads)) * (width - left - right)
  const y = (value: number) => panelHeight - bottom - scale(value) * (panelHeight - top - bottom)

  const grid = ticks.map(
    (tick) =>
      `<path d="M${left} ${y(tick)}H${width - right}" stroke="#ddd"/>` +
      `<text x="${left - 8}" y="${y(tick) + 4}" text-anchor="end">${tick}</text>`
  )
  const axis = loads.map(
    (load) => `<text x="${x(load)}" y="${panelHeight - bottom + 18}" text-anchor="middle">${load}</text>`
  )
  const lines = curves.map(({ name, colour, points, value, isDashed = false }, index) => {
    const path = points
      .filter((point) => Number.isFinite(value(point)))
      .map((point) => `${x(point.load).toFixed(1)} ${y(value(point)).toFixed(1)}`)
      .join('L')
    const dash = isDashed ? ' stroke-dasharray="5 4"' : ''
    const label = `<text x="${left + 10 + index * 165}" y="${top - 6}" fill="${colour}">${name}</text>`
    return `<path d="M${path}" fill="none" stroke="${colour}" stroke-width="2"${dash}/>${label}`
  })
  const heading = `<text x="${left}" y="16" font-weight="bold">${title}</text>`
  return `<g transform="translate(0 ${offset})">${heading}${[...grid, ...axis, ...lines].join('')}</g>`
}
