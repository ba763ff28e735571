/*
 * npm run bench                      all benchmarks but metrics; results in bench/results/all.json
 * npm run bench -- NAME              one of them; results in bench/results/NAME.json
 * npm run bench -- limit --short     in less than a minute
 * npm run bench -- compare OLD NEW   two result files side by side
 */
import { compare } from './compare.js'
import { Lab } from './lab.js'
import { limit } from './limit.js'
import { login } from './login.js'
import { metrics } from './metrics.js'
import { overhead } from './overhead.js'
import { overload } from './overload.js'
import { priority } from './priority.js'
import { refusals } from './refusals.js'
import { printTable, type Row, writeResults } from './report.js'
import { scale } from './scale.js'

const benches: Record<string, (lab: Lab) => Promise<Row[]>> = {
  limit,
  priority,
  overload,
  overhead,
  metrics,
  refusals,
  login,
  scale
}

const [name = 'all', ...args] = process.argv.slice(2)
const short = args.includes('--short')

if (name === 'compare') {
  compare(args)
} else {
  // In less than 12 minutes.
  const all = Object.values(benches).filter((bench) => bench !== metrics)
  const chosen = name === 'all' ? all : [benches[name]]
  const rows: Row[] = []
  let storeVersions: Record<string, string> | undefined
  try {
    for (const bench of chosen) {
      if (bench === undefined) throw new Error(`no benchmark ${name}; there are ${Object.keys(benches).join(', ')}`)
      const lab = await Lab.open()
      try {
        rows.push(...(bench === limit ? await limit(lab, short) : await bench(lab)))
        storeVersions ??= await lab.versions()
      } finally {
        await lab.close()
      }
    }
  } finally {
    // What was measured before a benchmark failed is not lost.
    printTable(rows)
    if (!short && rows.length > 0) process.stdout.write(`\n${writeResults(name, rows, storeVersions)}\n`)
  }
}
