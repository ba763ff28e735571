/*
 * node --import tsx/esm scripts/smoke.ts COMMAND…: runs a built service in production mode on private stores. It signs up one user,
 * and ends the service with SIGTERM. The command gets PORT and all other variables in its environment. Writes .tap/openapi.json.
 */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdirSync, writeFileSync } from 'node:fs'
import { freePort } from '../dev/embedded-stores.js'
import { client } from '../testkit/client.js'
import { startStores } from '../testkit/private-stores.js'
import { isReady, until } from '../testkit/until.js'

const [program = '', ...args] = process.argv.slice(2)
const stores = await startStores()
const port = await freePort()
const url = `http://127.0.0.1:${port}`
const variables = { NODE_ENV: 'production', TRUST_PROXY: 'none', SMS: 'off', PORT: `${port}`, ...stores.environment }
const service = spawn(program, args, { env: { ...process.env, ...variables }, stdio: 'inherit' })
try {
  await until('the service is ready', async () => {
    if (service.exitCode !== null) throw new Error('the service ended')
    return isReady(url)
  })
  const [mobile, sms_code, password] = ['13812345678', '123456', 'a password of the smoke run']
  await stores.redis.set(`sms_code_${mobile}`, sms_code, 'EX', 300)
  const reply = await client(url).signUp({ mobile, sms_code, password, password2: password })
  if (reply.statusCode !== 201 || reply.cookies[0]?.name !== '__Host-sid') throw new Error(`no sign-up: ${reply.body}`)
  mkdirSync('.tap', { recursive: true })
  writeFileSync('.tap/openapi.json', await (await fetch(`${url}/openapi.json`)).text())
} finally {
  service.kill('SIGTERM')
  if (service.exitCode === null) await once(service, 'exit')
  await stores.stop()
}
if (service.exitCode !== 0) throw new Error(`SIGTERM ended the service with ${service.exitCode}`)
process.stdout.write('smoke: signed up, and exit code 0 after SIGTERM\n')
