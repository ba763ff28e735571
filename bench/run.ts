/* The commands of `npm run bench`: see `usage`. */
import { insertScale } from './insert-scale.js'
import { journey } from './journey.js'
import { overload } from './overload.js'
import { refusalLatency } from './refusal-latency.js'
import { printTable, type Row, writeResults } from './report.js'
import { signUps } from './sign-ups.js'
import { SystemUnderTest } from './system-under-test.js'

type Benchmark = (system: SystemUnderTest, options: { isShort: boolean }) => Promise<Row[]>

const benchmarks: Record<string, Benchmark> = {
  limit: signUps,
  priority: refusalLatency,
  overload,
  journey,
  scale: insertScale
}

const usage = `usage:
  npm run bench                    all benchmarks, in about twelve minutes
  npm run bench -- NAME            one of them: ${Object.keys(benchmarks).join(', ')}
  npm run bench -- limit --short   limit in less than a minute, without a result file
The results are written to bench/results/NAME.json, those of all benchmarks to bench/results/all.json.
`

const [name = 'all', ...args] = process.argv.slice(2)
const isShort = args.includes('--short')
const chosen = Object.entries(benchmarks).filter(([other]) => name === 'all' || name === other)
if (chosen.length === 0) {
  process.stderr.write(usage)
  process.exit(1)
}

const rows: Row[] = []
let storeVersions = {}
try {
  for (const [, benchmark] of chosen) {
    const system = await SystemUnderTest.start()
    try {
      storeVersions = await system.storeVersions()
      rows.push(...(await benchmark(system, { isShort })))
    } finally {
      await system.stop()
    }
  }
} finally {
  // If a benchmark fails, the results of those before it are kept.
  printTable(rows)
  if (!isShort && rows.length > 0) process.stdout.write(`\n${writeResults(name, rows, storeVersions)}\n`)
}
