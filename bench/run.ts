/* The commands of `npm run bench`: see `usage`. */
import { compare } from './compare.js'
import { hashingLimit } from './hashing-limit.js'
import { insertScale } from './insert-scale.js'
import { login } from './login.js'
import { metricsCost } from './metrics-cost.js'
import { overload } from './overload.js'
import { refusalLatency } from './refusal-latency.js'
import { refusalThroughput } from './refusal-throughput.js'
import { printTable, type Row, writeResults } from './report.js'
import { SystemUnderTest } from './system-under-test.js'

type Benchmark = (system: SystemUnderTest, options: { isShort: boolean }) => Promise<Row[]>

const benchmarks = new Map<string, Benchmark>([
  ['limit', hashingLimit],
  ['priority', refusalLatency],
  ['overload', overload],
  ['metrics', metricsCost],
  ['refusals', refusalThroughput],
  ['login', login],
  ['scale', insertScale]
])

const usage = `usage:
  npm run bench                      all benchmarks but metrics, in about eleven minutes
  npm run bench -- NAME              one benchmark: ${[...benchmarks.keys()].join(', ')}
  npm run bench -- limit --short     limit in less than a minute, without a result file
  npm run bench -- compare OLD NEW   two result files side by side
The results are written to bench/results/NAME.json, those of all benchmarks to bench/results/all.json.
`

const [name = 'all', ...args] = process.argv.slice(2)
const isShort = args.includes('--short')

if (name === 'compare') {
  const [oldFile, newFile] = args
  if (oldFile === undefined || newFile === undefined) exitWithUsage()
  compare(oldFile, newFile)
} else {
  await runBenchmarks(chooseBenchmarks())
}

function chooseBenchmarks(): Benchmark[] {
  // Metrics are measured apart, because P1 to P8 do not depend on them.
  if (name === 'all') return [...benchmarks.values()].filter((benchmark) => benchmark !== metricsCost)
  const benchmark = benchmarks.get(name)
  return benchmark === undefined ? exitWithUsage() : [benchmark]
}

async function runBenchmarks(chosen: readonly Benchmark[]): Promise<void> {
  const rows: Row[] = []
  let storeVersions: Record<string, string> | undefined
  try {
    for (const benchmark of chosen) {
      const system = await SystemUnderTest.start()
      try {
        rows.push(...(await benchmark(system, { isShort })))
        storeVersions ??= await system.storeVersions()
      } finally {
        await system.stop()
      }
    }
  } finally {
    // If a benchmark fails, the results of those before it are kept.
    printTable(rows)
    if (!isShort && rows.length > 0) process.stdout.write(`\n${writeResults(name, rows, storeVersions)}\n`)
  }
}

function exitWithUsage(): never {
  process.stderr.write(usage)
  process.exit(1)
}
