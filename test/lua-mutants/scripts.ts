import { readFile } from 'node:fs/promises'
import { Redis } from 'ioredis'
import { type Mutant, mutantsOf } from './mutants.js'

/**
 * The files with Lua scripts, by their paths in src without an extension, and the tests that cover them. The first of these
 * is run for each mutant, and the others for those that survive it.
 */
const files = [
  { file: 'codes/scripts', test: 'codes', otherTests: ['claims', 'strangers', 'sms-codes', 'properties'] },
  { file: 'sessions/sessions', test: 'session-index', otherTests: ['sessions', 'logins', 'epochs'] },
  { file: 'stores/rate-limits', test: 'rate-limits', otherTests: ['sms-codes', 'logins'] }
]

export interface Script {
  /** Its file, by its path in src without an extension. */
  file: string
  name: string
  /** Its line in the source. */
  line: number
  /** The text in its file, which may begin with the interpolation of another script. */
  lua: string
  /** Names of test files. */
  test: string
  otherTests: readonly string[]
}

/** A mutant that compiles. */
export interface ScriptMutant extends Mutant {
  script: Script
  /** `<script>: <change>` */
  id: string
}

export async function readScripts(): Promise<Script[]> {
  const scripts = files.map(async ({ file, ...tests }) => {
    const source = await readFile(new URL(`../../src/${file}.ts`, import.meta.url), 'utf8')
    return [...source.matchAll(/const (\w+) = `([^`]*redis\.call[^`]*)`/g)].map(
      ({ 1: name = '', 2: lua = '', index }) => ({
        file,
        name,
        line: source.slice(0, index).split('\n').length,
        lua,
        ...tests
      })
    )
  })
  return (await Promise.all(scripts)).flat()
}

/** Returns the mutants of some scripts that Redis compiles. */
export async function compiledMutants(redisUrl: string, scripts: readonly Script[]): Promise<ScriptMutant[]> {
  const redis = new Redis(redisUrl)
  const compiles = (lua: string) =>
    redis.script('LOAD', interpolate(scripts, lua)).then(
      () => true,
      () => false
    )
  const compiled: ScriptMutant[] = []
  for (const script of scripts) {
    if (!(await compiles(script.lua))) throw new Error(`${script.name} does not compile`)
    for (const mutant of mutantsOf(script.lua)) {
      if (await compiles(mutant.lua)) compiled.push({ ...mutant, script, id: `${script.name}: ${mutant.change}` })
    }
  }
  redis.disconnect()
  return compiled
}

/** Inserts the script `name` where a script contains `${name}`. */
export const interpolate = (scripts: readonly Script[], lua: string) =>
  lua.replace(/\$\{(\w+)\}/g, (_, name) => scripts.find((script) => script.name === name)?.lua ?? '')
