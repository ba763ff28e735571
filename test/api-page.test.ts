import t from 'tap'
import { startBrowser } from '../testkit/browser.js'
import { statusAndErrno } from '../testkit/client.js'
import { startTestbed } from '../testkit/testbed.js'

const { build, redis, signUpBody } = await startTestbed(t)
const { visit } = await startBrowser(t)

t.test('a user signs up, logs out and logs in on the page /docs', async (t) => {
  const app = await build(t, { DOCS: 'true' })
  const { page, errors } = await visit(t, await app.listen({ port: 0, host: '127.0.0.1' }))
  await page.goto('/docs')

  /** Sends the request of an operation, and returns the status and the whole response that the page shows. */
  async function tryOut(operationId: string, body?: object) {
    const operation = page.locator(`[id$="-${operationId}"]`)
    await operation.locator('.opblock-summary').first().click()
    if (body !== undefined) await operation.locator('textarea.body-param__text').fill(JSON.stringify(body))
    await operation.locator('button.execute').click()
    const responses = operation.locator('.live-responses-table')
    const status = await responses.locator('.response-col_status').nth(1).innerText()
    return { status: status.trim().slice(0, 3), response: await responses.innerText() }
  }

  const { mobile, password } = await signUpBody()
  t.equal((await tryOut('sendCode', { mobile })).status, '202')
  const code = await redis.get(`sms_code_${mobile}`)
  t.equal((await tryOut('signUp', { mobile, sms_code: code, password, password2: password })).status, '201')
  const session = await tryOut('whoAmI')
  t.equal(session.status, '200')
  t.match(session.response, mobile, 'the browser sends the session cookie')
  t.equal((await tryOut('logOut')).status, '200')
  t.equal((await tryOut('logIn', { mobile, password })).status, '201')
  t.strictSame(errors, [], 'no error in the console, no request to another host')
})

t.test('DOCS=false removes the page and keeps /openapi.json', async (t) => {
  const app = await build(t, { DOCS: 'false' })
  for (const path of ['/docs', '/docs/', '/docs/static/index.html']) {
    t.strictSame(statusAndErrno(await app.inject(path)), [404, '4201'])
  }
  t.equal((await app.inject('/openapi.json')).statusCode, 200)
})
