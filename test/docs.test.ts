import type { AddressInfo } from 'node:net'
import t from 'tap'
import { visit } from './browser.js'
import { brief, build, redis, signUpBody } from './helper.js'

t.test('the page of the API: the journey is tried on it, with the session’s cookie', async (t) => {
  const app = await build(t, { DOCS: 'true' })
  await app.listen({ port: 0, host: '127.0.0.1' })
  const { port } = app.server.address() as AddressInfo
  const { page, faults } = await visit(t, `http://127.0.0.1:${port}`)
  await page.goto('/docs')

  /** Opens an operation, sends its request with a body, and gives the status that the page shows. */
  async function tryOut(operationId: string, body?: object): Promise<string> {
    const operation = page.locator(`[id$="-${operationId}"]`)
    await operation.locator('.opblock-summary').first().click()
    if (body !== undefined) await operation.locator('textarea.body-param__text').fill(JSON.stringify(body))
    await operation.locator('button.execute').click()
    const status = operation.locator('.live-responses-table .response-col_status').nth(1)
    return (await status.innerText()).trim().slice(0, 3)
  }
  const shown = () => page.locator('.live-responses-table').last().innerText()

  const { mobile, password } = await signUpBody()
  t.equal(await tryOut('sendCode', { mobile }), '202')
  const code = await redis.get(`sms_code_${mobile}`)
  t.equal(await tryOut('signUp', { mobile, sms_code: code, password, password2: password }), '201')
  t.equal(await tryOut('whoAmI'), '200')
  t.match(await shown(), mobile, 'the cookie goes along')
  t.equal(await tryOut('logOut'), '200')
  t.equal(await tryOut('logIn', { mobile, password }), '201')
  t.strictSame(faults, [], 'no error in the console, no request to another host')
})

t.test('without DOCS there is no page; the description stays', async (t) => {
  const app = await build(t, { DOCS: 'false' })
  for (const path of ['/docs', '/docs/', '/docs/static/index.html']) {
    t.strictSame(brief(await app.inject(path)), [404, '4201'])
  }
  t.equal((await app.inject('/openapi.json')).statusCode, 200)
})
