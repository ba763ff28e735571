import { execFileSync } from 'node:child_process'
import t from 'tap'
import { networksOf } from '#src/http/network.js'
import { client } from '../testkit/client.js'
import { startWebhook, unlimitedSms } from '../testkit/sms-webhook.js'
import { startTestbed } from '../testkit/testbed.js'

/*
 * Which networks an address counts for. test/limits.test.ts has the limits that count them.
 */

const { build, newMobile, redis } = await startTestbed(t)

t.test('an address counts for its IPv4 address, also inside IPv6, or for its /64 and its /48', async (t) => {
  const ipv4 = [{ network: '192.0.2.1', share: 1 }]
  for (const address of [
    '192.0.2.1',
    '192.0.2.1:5678',
    '::ffff:192.0.2.1',
    '::ffff:c000:201',
    '[::ffff:192.0.2.1]:5678',
    '64:ff9b::192.0.2.1',
    '64:ff9b::c000:201',
    '[64:ff9b::c000:201]:443',
    '64:ff9b:1::192.0.2.1',
    '64:ff9b:1:2:3:4:c000:201',
    '::ffff:0:192.0.2.1',
    '2002:c000:201::',
    '2002:c000:201:5:6:7:8:9'
  ]) {
    t.strictSame(networksOf(address), ipv4, address)
    t.strictSame(networksOf(address, 4), ipv4, address)
  }
  const site = (share: number) => [
    { network: '2001:db8:1:2::/64', share: 1 },
    { network: '2001:db8:1::/48', share }
  ]
  for (const address of [
    '2001:db8:1:2:3:4:5:6',
    '2001:DB8:1:2::',
    '[2001:db8:1:2::1]:5678',
    '[2001:db8:1:2::1]',
    '2001:db8:1:2::/64',
    '2001:db8:1:2::192.0.2.1'
  ]) {
    t.strictSame(networksOf(address), site(64), address)
    t.strictSame(networksOf(address, 4), site(4), address)
  }
  for (const invalid of ['unknown', '', '_hidden', '192.0.2.256', '2001:db8::1::2', ':::']) {
    t.strictSame(networksOf(invalid), [{ network: 'unknown', share: 1 }], invalid)
  }
})

t.test(
  'G8: a client that is gone before its request is read counts for no network, and gets nothing done',
  async (t) => {
    for (const env of [{}, { TRUST_PROXY: '127.0.0.1' }]) {
      const webhook = await startWebhook(t)
      const app = await build(t, { ...unlimitedSms, SMS_WEBHOOK_URL: webhook.url, SMS_IP_HOURLY_MAX: '20', ...env })
      const { port } = new URL(await app.listen({ port: 0, host: '127.0.0.1' }))
      const [gone, present] = [newMobile(), newMobile()]
      const body = JSON.stringify({ mobile: gone })
      const request = [
        'POST /api/v1.0/sms_codes HTTP/1.1',
        'Host: localhost',
        'Content-Type: application/json',
        `Content-Length: ${body.length}`,
        '',
        body
      ].join('\r\n')
      // The service reads nothing while another process sends the request and resets the connection: execFileSync blocks it.
      const script = `
      const socket = require('net').connect(${port}, '127.0.0.1', () =>
        socket.write(${JSON.stringify(request)}, () => socket.resetAndDestroy()))`
      execFileSync(process.execPath, ['-e', script])
      // Node.js 24 does not read the request of such a connection, and 20 does. A later one is answered after it.
      t.equal((await client(`http://127.0.0.1:${port}`).sendCode(present)).statusCode, 202)
      t.strictSame(
        webhook.received.map(({ mobile }) => mobile),
        [present]
      )
      t.strictSame(await redis.keys('*unknown*'), [])
      t.strictSame(await redis.keys(`*${gone}*`), [])
    }
  }
)
