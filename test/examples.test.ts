import { createHmac } from 'node:crypto'
import t, { type Test } from 'tap'
import { createWebhook, MessageRefused, type SmsMessage } from '../examples/sms-webhook.js'
import { client, statusAndErrno } from '../testkit/client.js'
import { listen } from '../testkit/listen.js'
import { startTestbed } from '../testkit/testbed.js'

const { build, newMobile, redis } = await startTestbed(t)

const secret = 'the secret of the webhook'

/** Starts the example with a provider that does what the test says. */
async function startWebhook(t: Test, sendSms: (message: SmsMessage) => Promise<void>): Promise<string> {
  const server = createWebhook({ secret, sendSms })
  return `${await listen(t, server)}/`
}

t.test('the example of a webhook delivers the codes of the service', async (t) => {
  const sent: SmsMessage[] = []
  const url = await startWebhook(t, async (message) => void sent.push(message))
  const app = await build(t, { SMS_WEBHOOK_URL: url, SMS_WEBHOOK_SECRET: secret })
  const mobile = newMobile()
  t.equal((await client(app).sendCode(mobile)).statusCode, 202)
  t.match(sent, [{ mobile, code: await redis.get(`sms_code_${mobile}`), ttlSeconds: 300 }])
})

t.test('a number that the provider refuses does not stop messages to other numbers', async (t) => {
  const refused = newMobile()
  const url = await startWebhook(t, async ({ mobile }) => {
    if (mobile === refused) throw new MessageRefused()
  })
  const app = await build(t, { SMS_WEBHOOK_URL: url, SMS_WEBHOOK_SECRET: secret, SMS_RESEND_S: '0' })
  for (let n = 0; n < 6; n++) t.strictSame(statusAndErrno(await client(app).sendCode(refused)), [503, '4301'])
  t.equal((await client(app).sendCode(newMobile())).statusCode, 202)
})

t.test('a provider that fails is 503 4301', async (t) => {
  const url = await startWebhook(t, () => Promise.reject(new Error('the provider is away')))
  const app = await build(t, { SMS_WEBHOOK_URL: url, SMS_WEBHOOK_SECRET: secret })
  t.strictSame(statusAndErrno(await client(app).sendCode(newMobile())), [503, '4301'])
})

t.test('a message is sent once, and only with a valid, recent signature', async (t) => {
  let sentCount = 0
  const url = await startWebhook(t, async () => void sentCount++)
  const body = JSON.stringify({ mobile: newMobile(), code: '123456', ttl_s: 300, id: 'one' })
  const sign = (text: string, seconds: number, key = secret) =>
    `t=${seconds},v1=${createHmac('sha256', key).update(`${seconds}.${text}`).digest('hex')}`
  const post = async (text: string, signature: string, method = 'POST') => {
    const headers = { 'x-signature': signature }
    return (await fetch(url, { method, headers, ...(method === 'POST' && { body: text }) })).status
  }
  const now = Math.floor(Date.now() / 1_000)
  t.equal(await post(body, sign(body, now)), 204)
  t.equal(await post(body, sign(body, now)), 204, 'the same id')
  t.equal(await post(body, sign(body, now, 'another secret')), 401)
  t.equal(await post(body, sign(`${body} `, now)), 401)
  t.equal(await post(body, sign(body, now - 3_600)), 401)
  t.equal(await post(body, 'no signature'), 401)
  t.equal(await post('{}', sign('{}', now)), 400)
  t.equal(await post('{', sign('{', now)), 400)
  const large = ' '.repeat(5_000)
  t.equal(await post(large, sign(large, now)), 413)
  t.equal(await post('', '', 'GET'), 405)
  t.equal(sentCount, 1)
})
