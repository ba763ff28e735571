import { execFileSync, spawn } from 'node:child_process'
import { createSocket } from 'node:dgram'
import { once } from 'node:events'
import { rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import t, { type Test } from 'tap'
import { client, statusAndErrno } from '../testkit/client.js'
import { createTemporaryFolder } from '../testkit/temporary-folder.js'
import { patient, startTestbed } from '../testkit/testbed.js'
import { until } from '../testkit/until.js'

/*
 * Names of the webhook and of the stores, with a name server of the test. A process has its own /etc/resolv.conf by a mount
 * namespace, which needs root, as does port 53. The rest of the machine keeps its own.
 */

const nameServer = '127.0.0.153'
const isPossible =
  process.getuid?.() === 0 &&
  (() => {
    try {
      execFileSync('unshare', ['-m', 'true'], { stdio: 'ignore' })
      return true
    } catch {
      return false
    }
  })()
if (!isPossible) t.pass('not tried: only root has mount namespaces and port 53', { skip: true })
else await testNames()

async function testNames(): Promise<void> {
  const { stores, signUpBody, newMobile } = await startTestbed(t)
  const folder = createTemporaryFolder()
  t.teardown(() => rm(folder, { recursive: true }))

  /** The answers by type and name: addresses, or an rcode. The server is silent where there is none. */
  const zone = new Map<string, string[] | number>()
  const asked: string[] = []
  const server = createSocket('udp4')
  server.on('message', (query, { port, address }) => {
    const labels: string[] = []
    let offset = 12
    while (query[offset]) {
      const length = query[offset] ?? 0
      labels.push(query.toString('latin1', offset + 1, offset + 1 + length))
      offset += 1 + length
    }
    const type = query.readUInt16BE(offset + 1) === 28 ? 'AAAA' : 'A'
    const name = labels.join('.').toLowerCase()
    asked.push(`${type} ${name}`)
    const answer = zone.get(`${type} ${name}`) ?? zone.get(`* ${name}`)
    if (answer === undefined) return
    const addresses = typeof answer === 'number' ? [] : answer
    const header = Buffer.from(query.subarray(0, 12))
    header.writeUInt16BE(0x8180 + (typeof answer === 'number' ? answer : 0), 2)
    for (const [at, count] of [1, addresses.length, 0, 0].entries()) header.writeUInt16BE(count, 4 + 2 * at)
    const records = addresses.map((text) => {
      const bytes =
        type === 'A' ? Buffer.from(text.split('.').map(Number)) : Buffer.from(text.replaceAll(':', ''), 'hex')
      return Buffer.concat([
        Buffer.from([0xc0, 12, 0, type === 'A' ? 1 : 28, 0, 1, 0, 0, 0, 0, 0, bytes.length]),
        bytes
      ])
    })
    server.send(Buffer.concat([header, query.subarray(12, offset + 5), ...records]), port, address)
  })
  server.bind(53, nameServer)
  await once(server, 'listening')
  t.teardown(() => server.close())

  /** Runs Node.js with this resolv.conf. */
  async function start(t: Test, args: string[], env: Record<string, string> = {}, options = '') {
    const file = join(folder, `${Math.random()}`)
    await writeFile(file, `nameserver ${nameServer}\n${options}`)
    const command = `mount --bind ${file} /etc/resolv.conf && exec "$@"`
    const child = spawn('unshare', ['-m', 'sh', '-c', command, 'sh', process.execPath, ...args], {
      env: { PATH: process.env.PATH, ...env },
      stdio: ['ignore', 'pipe', 'pipe']
    })
    t.teardown(() => child.kill('SIGKILL'))
    const output = { text: '' }
    for (const stream of [child.stdout, child.stderr]) stream.on('data', (data) => (output.text += data))
    return { child, output }
  }

  const threads = { HASH_THREADS: '1', UV_THREADPOOL_SIZE: '1', HASH_MEMORY_KIB: '64', HASH_PASSES: '1' }

  async function startService(t: Test, env: Record<string, string>, options = '') {
    const variables = { ...stores.environment, ...patient, ...threads, DOCS: 'false', PORT: '0', ...env }
    const { child, output } = await start(t, ['dist/server.js'], variables, options)
    await until('the service listens', () => /Server listening at http/.test(output.text) || child.exitCode !== null)
    const [, url = ''] = /Server listening at (http:[^"]+)/.exec(output.text) ?? []
    return { url, child, output }
  }

  t.test('a webhook whose name server is silent does not hold up a sign-up, with one thread for hashes', async (t) => {
    const { url } = await startService(t, { SMS_WEBHOOK_URL: 'https://sms.silent.example/', SMS_RESEND_S: '0' })
    const sends = [1, 2].map(() => client(url).sendCode(newMobile()))
    await until('the name server is asked', () => asked.some((question) => question.endsWith(' sms.silent.example')))
    const startedAt = performance.now()
    t.equal((await client(url).signUp(await signUpBody())).statusCode, 201)
    t.ok(performance.now() - startedAt < 2_000, `it took ${performance.now() - startedAt} ms`)
    for (const send of sends) t.strictSame(statusAndErrno(await send), [503, '4301'])
  })

  t.test('the name of a store is found, also with a search domain', async (t) => {
    zone.set('A stores.cluster.local', ['127.0.0.1']).set('AAAA stores.cluster.local', 0)
    zone.set('A stores', 3).set('AAAA stores', 3)
    // A search domain that the name server refuses, or fails, must not hide the name behind it.
    zone.set('* stores.cluster.local.refused.example', 5).set('* stores.cluster.local.failing.example', 2)
    const withName = (url: string) => url.replace('127.0.0.1', 'stores.cluster.local')
    const { url } = await startService(
      t,
      {
        DATABASE_URL: withName(`${stores.environment.DATABASE_URL}`),
        REDIS_URL: withName(`${stores.environment.REDIS_URL}`)
      },
      'search refused.example failing.example\noptions ndots:5\n'
    )
    t.equal((await client(url).signUp(await signUpBody())).statusCode, 201)
  })

  t.test('look-ups have the answers of getaddrinfo', async (t) => {
    zone.set('A both.example', ['192.0.2.1', '192.0.2.2'])
    zone.set('AAAA both.example', ['2001:0db8:0000:0000:0000:0000:0000:0001'])
    zone.set('A short.search.example', ['192.0.2.3']).set('AAAA short.search.example', 0)
    zone.set('* failing.example', 2).set('* unknown.example', 3).set('* unknown.example.search.example', 3)
    zone.set('* both.example.search.example', 3).set('* failing.example.search.example', 3)
    zone.set('* short', 3)
    const script = `
      import './dist/name-lookups.js'
      import dns from 'node:dns'
      const questions = ${JSON.stringify([
        ['both.example', { all: true }],
        ['both.example', { all: true, order: 'ipv6first' }],
        ['both.example', { all: true, family: 6 }],
        ['both.example', 4],
        ['both.example', { family: 'IPv6' }],
        ['both.example.', {}],
        ['short', {}],
        ['localhost', { family: 4 }],
        ['192.0.2.9', {}],
        ['::1', { all: true }],
        ['failing.example', {}],
        ['unknown.example', {}],
        ['silent.example', {}]
      ])}
      for (const [name, options] of questions) {
        await new Promise((resolve) => dns.lookup(name, options, (error, ...result) => {
          console.log(JSON.stringify(error ? error.code : result))
          resolve()
        }))
      }
      dns.lookup('both.example', (error, address) => console.log(address))`
    const one = (address: string, family: number) => ({ address, family })
    const [first, second, third] = [one('192.0.2.1', 4), one('192.0.2.2', 4), one('2001:db8::1', 6)]
    const { child, output } = await start(t, ['--input-type=module', '-e', script], {}, 'search search.example\n')
    await once(child, 'close')
    t.strictSame(output.text.trim().split('\n'), [
      ...[
        [[first, second, third]],
        [[third, first, second]],
        [[third]],
        ['192.0.2.1', 4],
        ['2001:db8::1', 6],
        ['192.0.2.1', 4],
        ['192.0.2.3', 4],
        ['127.0.0.1', 4],
        ['192.0.2.9', 4],
        [[one('::1', 6)]],
        'EAI_AGAIN',
        'ENOTFOUND',
        'ETIMEOUT'
      ].map((line) => JSON.stringify(line)),
      '192.0.2.1'
    ])
  })
}
