import { readFileSync } from 'node:fs'
import type { ServerProcess } from '../testkit/server-process.js'

/** The unit of the CPU times in /proc, on every Linux. */
const ticksPerSecond = 100

const read = ({ child: { pid } }: ServerProcess, file: string) => readFileSync(`/proc/${pid}/${file}`, 'utf8')

/** Returns the CPU time of all threads of a process, in milliseconds. */
export function cpuMs(process: ServerProcess): number {
  // The name may contain spaces. After it, state is field 3, utime 14 and stime 15 (proc(5)).
  const fields = read(process, 'stat').split(') ')[1]?.split(' ') ?? []
  return ((Number(fields[11]) + Number(fields[12])) * 1_000) / ticksPerSecond
}

/** Returns the CPU time of the main thread, which runs the event loop, in milliseconds. */
export const mainThreadMs = (process: ServerProcess) =>
  // The first field is the time on a CPU in nanoseconds (Documentation/scheduler/sched-stats.rst of Linux).
  Number(read(process, `task/${process.child.pid}/schedstat`).split(' ')[0]) / 1e6

/** Returns the resident memory, in MiB. */
export const residentMib = (process: ServerProcess) =>
  Number(/^VmRSS:\s+(\d+)/m.exec(read(process, 'status'))?.[1]) / 1_024
