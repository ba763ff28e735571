import { spawn } from 'node:child_process'
import { cp, readFile, rm, symlink, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { createTemporaryFolder } from '../../testkit/temporary-folder.js'
import type { ScriptMutant } from './scripts.js'

const project = fileURLToPath(new URL('../..', import.meta.url))

/** No test file of an unchanged service takes longer. */
const usualMaxMs = 300_000

/** A run with a mutant may take twice the usual time plus this. A longer run has found the mutant. */
const extraMs = 30_000

/** How a run of a test file has ended. */
export type RunResult = 'passed' | 'failed' | 'timeout'

/** A copy of the built service and its tests, in which one mutant at a time is tested. The tests import the dist of the copy. */
export class Workspace {
  private constructor(private readonly directory: string) {}

  static async create(): Promise<Workspace> {
    const directory = createTemporaryFolder()
    for (const path of ['dist', 'src', 'test', 'testkit', 'sql', 'package.json', 'tsconfig.json']) {
      await cp(join(project, path), join(directory, path), { recursive: true })
    }
    await symlink(join(project, 'node_modules'), join(directory, 'node_modules'))
    return new Workspace(directory)
  }

  /** Calls a function while the copy has a mutant. */
  async withMutant<T>({ script, lua }: ScriptMutant, run: () => Promise<T>): Promise<T> {
    const file = join(this.directory, 'dist', `${script.file}.js`)
    const built = await readFile(file, 'utf8')
    const [before, after, ...others] = built.split(script.lua)
    if (after === undefined || others.length > 0) throw new Error(`${file} does not contain ${script.name} once`)
    await writeFile(file, `${before}${lua}${after}`)
    try {
      return await run()
    } finally {
      await writeFile(file, built)
    }
  }

  /** Runs a test file without a mutant. Returns how long it may take with one. */
  async measure(test: string): Promise<number> {
    const startedAt = Date.now()
    const result = await this.run(test, usualMaxMs)
    if (result !== 'passed') throw new Error(`test/${test}.test.ts fails without a mutant: ${result}`)
    return 2 * (Date.now() - startedAt) + extraMs
  }

  /** Runs a test file until its first failure. */
  async run(test: string, limitMs: number): Promise<RunResult> {
    const child = spawn(process.execPath, ['--import=tsx/esm', `test/${test}.test.ts`], {
      cwd: this.directory,
      env: { ...process.env, TAP_BAIL: '1', TAP_TIMEOUT: '250' },
      stdio: 'ignore'
    })
    const timer = setTimeout(() => child.kill('SIGKILL'), limitMs)
    const code = await new Promise<number | null>((resolve, reject) => {
      child.once('exit', resolve)
      child.once('error', reject)
    })
    clearTimeout(timer)
    if (code === null) return 'timeout'
    return code === 0 ? 'passed' : 'failed'
  }

  async dispose(): Promise<void> {
    await rm(this.directory, { recursive: true })
  }
}
