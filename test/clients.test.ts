import { Ajv2020 } from 'ajv/dist/2020.js'
import axe from 'axe-core'
import type { FastifyInstance } from 'fastify'
import type { Page } from 'playwright-core'
import { Webhook } from 'standardwebhooks'
import t, { type Test } from 'tap'
import type { Environment } from '#src/config/config.js'
import { type OutcomeName, outcomeNames, outcomes } from '#src/outcomes.js'
import { QueueFull } from '#src/passwords/hash-queue.js'
import { freePort } from '../dev/embedded-stores.js'
import { signUpPage } from '../dev/sign-up-page.js'
import { createWebhook, MessageRefused, type SmsMessage } from '../examples/sms-webhook.js'
import { startBrowser } from '../testkit/browser.js'
import { client, type Reply, statusAndErrno } from '../testkit/client.js'
import { listen } from '../testkit/listen.js'
import { startTestbed } from '../testkit/testbed.js'

/*
 * What others build on or open: OpenAPI, its page /docs, the sign-up page of npm start, the example of an SMS webhook.
 */

const { build, openProxy, signUpBody, issueCode, cookieOf, newMobile, redis } = await startTestbed(t)
const { visit } = await startBrowser(t)

/** A request body or a response. Only a response has headers and examples. */
interface Content<Schema> {
  headers?: object
  content: {
    'application/json': { schema: Schema; examples: Record<string, { value: { errmsg: string; data?: object } }> }
  }
}

interface Operation {
  security?: object[]
  requestBody?: Content<{ properties: Record<string, { examples?: string[] }>; examples?: object[] }>
  responses: Record<string, Content<object>>
}

type Paths = Record<string, Record<string, Operation>>

/** Returns the method of an operation that has a body, in capitals. */
const methodOf = (method: string) =>
  (['PUT', 'DELETE'] as const).find((name) => name === method.toUpperCase()) ?? 'POST'

const ajv = new Ajv2020({ strict: false })

async function documentOf(app: FastifyInstance): Promise<{ openapi: string; paths: Paths }> {
  return (await app.inject('/openapi.json')).json()
}

const signUp = 'POST /api/v1.0/users'
const resetPassword = 'PUT /api/v1.0/users/password'
const logIn = 'POST /api/v1.0/sessions'
const sendCode = 'POST /api/v1.0/sms_codes'
const whoAmI = 'GET /api/v1.0/session'
const logOut = 'DELETE /api/v1.0/session'
const deleteAccount = 'DELETE /api/v1.0/users'
const ready = 'GET /health/ready'

t.test('the reply of every outcome on every route matches its description', async (t) => {
  const proxies = [await openProxy(t, 'REDIS_URL'), await openProxy(t, 'DATABASE_URL')] as const
  const [redisProxy, postgresProxy] = proxies
  const app = await build(t, { REDIS_URL: redisProxy.url, DATABASE_URL: postgresProxy.url })
  const api = client(app)
  const { paths } = await documentOf(app)
  const seen = new Set<OutcomeName>()

  function check(operation: string, name: OutcomeName, { statusCode, headers, body }: Reply) {
    seen.add(name)
    const [method = '', path = ''] = operation.split(' ')
    const about = `${operation}: ${name}`
    const { errno, errmsg, data = {} } = JSON.parse(body)
    t.strictSame([statusCode, errno], [outcomes[name].status, outcomes[name].errno], about)
    const response = paths[path]?.[method.toLowerCase()]?.responses[statusCode]
    if (response === undefined) throw new Error(`${about} is not described`)
    const { schema, examples } = response.content['application/json']
    t.ok(ajv.validate(schema, JSON.parse(body)), `${about} matches its schema: ${ajv.errorsText()}`)
    const example = examples[name]?.value
    t.equal(example?.errmsg, errmsg, `${about} has an example`)
    const fields = [example?.data ?? {}, data].map((value) => Object.keys(value).sort())
    t.strictSame(fields[0], fields[1], `the example of ${about} has its data`)
    const described = Object.keys(response.headers ?? {}).map((header) => header.toLowerCase())
    for (const header of ['retry-after', 'set-cookie', 'idempotent-replayed', 'x-request-id']) {
      if (headers[header] !== undefined) t.ok(described.includes(header), `${about} has the header ${header}`)
    }
  }

  // Invalid bodies. A logout has none, but Fastify reads it.
  const body = await signUpBody()
  const { mobile } = body
  const send = (operation: string, payload: object | string, type = 'application/json') => {
    const [method = '', url = ''] = operation.split(' ')
    return app.inject({ method: methodOf(method), url, headers: { 'content-type': type }, payload })
  }
  const { password, sms_code } = body
  for (const operation of [signUp, resetPassword, logIn, sendCode, deleteAccount, logOut]) {
    const fields = operation === logIn ? { password } : body
    check(operation, 'body_too_large', await send(operation, { ...fields, mobile, more: 'x'.repeat(5_000) }))
    check(operation, 'unsupported_content_type', await send(operation, 'a text', 'text/plain'))
    if (operation === logOut) continue
    check(operation, 'missing_parameter', await send(operation, { ...fields, mobile: '' }))
    check(operation, 'malformed_parameter', await send(operation, { ...fields, mobile: 1 }))
    check(operation, 'invalid_mobile', await send(operation, { ...fields, mobile: '1' }))
  }
  for (const operation of [signUp, resetPassword]) {
    for (const [name, changes] of [
      ['passwords_differ', { password2: 'another one' }],
      ['password_length', { password: 'short', password2: 'short' }],
      ['password_common', { password: 'password', password2: 'password' }],
      ['wrong_code', { sms_code: 'wrong' }]
    ] as const) {
      check(operation, name, await send(operation, { ...body, ...changes }))
    }
  }

  check(logIn, 'malformed_parameter', await send(logIn, { mobile, password, sms_code }))
  for (const operation of [logIn, deleteAccount]) {
    check(operation, 'wrong_code', await send(operation, { mobile, sms_code: 'wrong' }))
  }

  // Users and their sessions.
  const user = await signUpBody({ mobile })
  check(signUp, 'registered', await api.signUp(user))
  const repeated = await api.signUp(user)
  t.equal(repeated.headers['idempotent-replayed'], 'true')
  check(signUp, 'registered', repeated)
  check(signUp, 'mobile_registered', await api.signUp(await signUpBody({ mobile })))
  const newPassword = await signUpBody({ mobile })
  check(resetPassword, 'password_reset', await api.resetPassword(newPassword))
  const loggedIn = await api.logIn({ mobile, password: newPassword.password })
  check(logIn, 'logged_in', loggedIn)
  check(logIn, 'password_length', await api.logIn({ mobile, password: 'x'.repeat(129) }))
  for (let n = 0; n < 5; n++) check(logIn, 'wrong_login', await api.logIn({ mobile, password: 'wrong' }))
  check(logIn, 'too_many_requests', await api.logIn({ mobile, password: 'wrong' }))
  const cookie = cookieOf(loggedIn)
  check(whoAmI, 'session_found', await api.whoAmI(cookie))
  check(logOut, 'malformed_parameter', await api.logOut('', '?everywhere=1'))
  check(logOut, 'logged_out', await api.logOut(cookie))
  check(whoAmI, 'not_logged_in', await api.whoAmI(''))
  // The same for every route.
  check(whoAmI, 'bad_request', await app.inject('/api/v1.0/%zz'))

  const byCode = { mobile, sms_code: await issueCode(mobile) }
  for (let n = 0; n < 2; n++) check(logIn, 'logged_in', await api.logIn(byCode))
  const deletion = { mobile, sms_code: await issueCode(mobile) }
  check(deleteAccount, 'account_deleted', await api.deleteAccount(deletion))

  // Codes.
  check(sendCode, 'code_sent', await api.sendCode(mobile))
  check(sendCode, 'too_many_requests', await api.sendCode(mobile))
  const SMS_WEBHOOK_URL = `http://127.0.0.1:${await freePort()}/`
  const withoutGateway = await build(t, { SMS_WEBHOOK_URL, SMS_RESEND_S: '0' })
  check(sendCode, 'sms_gateway_unavailable', await client(withoutGateway).sendCode(mobile))

  // Failures.
  for (const path of ['live', 'ready']) check(`GET /health/${path}`, 'healthy', await app.inject(`/health/${path}`))
  const { hash, queue } = app.mobileSignup.passwords
  const { admit } = queue
  queue.admit = () => {
    throw new QueueFull(1)
  }
  for (const operation of [signUp, resetPassword]) check(operation, 'busy', await send(operation, await signUpBody()))
  check(logIn, 'busy', await api.logIn({ mobile, password }))
  queue.admit = admit
  app.mobileSignup.passwords.hash = () => Promise.reject(new Error('no memory'))
  check(signUp, 'internal_error', await api.signUp(await signUpBody()))
  app.mobileSignup.passwords.hash = hash
  await Promise.all(proxies.map((proxy) => proxy.apply('refuse')))
  check(logIn, 'storage_unavailable', await api.logIn({ mobile, password }))
  for (const operation of [signUp, resetPassword, sendCode, deleteAccount]) {
    check(operation, 'storage_unavailable', await send(operation, await signUpBody()))
  }
  app.lifecycle.announceShutdown()
  check(ready, 'busy', await app.inject('/health/ready'))

  // An unknown route has no description.
  t.strictSame(new Set(outcomeNames.filter((name) => name !== 'no_such_route')), seen, 'every outcome was checked')
})

t.test('the document is OpenAPI 3.1, and its examples are valid', async (t) => {
  const app = await build(t)
  const { openapi, paths } = await documentOf(app)
  t.equal(openapi, '3.1.0')
  for (const method of ['get', 'delete']) {
    t.strictSame(paths['/api/v1.0/session']?.[method]?.security, [{ session: [] }], `${method} takes the cookie`)
  }
  for (const [path, operations] of Object.entries(paths)) {
    for (const [method, { requestBody, responses }] of Object.entries(operations)) {
      for (const { content } of Object.values(responses)) {
        const { schema, examples } = content['application/json']
        for (const [name, { value }] of Object.entries(examples)) {
          t.ok(ajv.validate(schema, value), `${method} ${path} ${name}: ${ajv.errorsText()}`)
        }
      }
      if (requestBody === undefined) continue
      const { properties, examples } = requestBody.content['application/json'].schema
      const ofFields = Object.entries(properties).map(([name, { examples }]) => [name, examples?.[0]])
      const [payload = Object.fromEntries(ofFields)] = examples ?? []
      const reply = await app.inject({ method: methodOf(method), url: path, payload })
      t.not(reply.statusCode, 400, `${method} ${path} accepts its example`)
    }
  }
})

t.test('LEGACY_STATUS describes all outcomes of a route with 200, except those of probes', async (t) => {
  const { paths } = await documentOf(await build(t, { LEGACY_STATUS: 'true', API_PREFIX: '/' }))
  t.strictSame(Object.keys(paths['/users']?.post?.responses ?? {}), ['200', '400'])
  t.strictSame(Object.keys(paths['/health/ready']?.get?.responses ?? {}), ['200', '400', '503'])
})

const withPage = { page: signUpPage }

/** Opens the sign-up page of `npm start`. */
async function openPage(t: Test, locale: string, env: Environment = {}) {
  const app = await build(t, env, withPage)
  const { page, errors } = await visit(t, await app.listen({ port: 0, host: '127.0.0.1' }), locale)
  await page.goto('/')
  return { app, page, errors }
}

const shownError = (page: Page) => page.getByRole('alert').innerText()
const focusedId = (page: Page) => page.evaluate('document.activeElement.id')
const codeOf = async (mobile: string) => `${await redis.get(`sms_code_${mobile}`)}`

/** Returns the accessibility rules of axe that the page violates, in both colour schemes. */
async function axeViolations(page: Page): Promise<string[]> {
  const violations: string[] = []
  for (const colorScheme of ['light', 'dark'] as const) {
    await page.emulateMedia({ colorScheme, reducedMotion: 'reduce' })
    await page.evaluate(axe.source)
    const ids: string[] = await page.evaluate('axe.run().then(({ violations }) => violations.map(({ id }) => id))')
    violations.push(...ids)
  }
  return violations
}

t.test('a user signs up and logs out on the page, and axe finds no violation', async (t) => {
  const { page, errors } = await openPage(t, 'en-GB')
  const mobile = newMobile()
  t.equal(await page.locator('html').getAttribute('lang'), 'en')
  t.strictSame(await axeViolations(page), [])

  await page.locator('#mobile').fill(mobile)
  await page.getByRole('button', { name: 'Send code' }).click()
  await page.getByRole('status').getByText('Sent').waitFor()
  t.ok(await page.getByRole('button', { name: /Again in \d+ s/ }).isDisabled(), 'a countdown until the next code')
  await page.locator('#sms_code').fill(await codeOf(mobile))
  await page.locator('#password').fill('correct horse')
  await page.locator('#password2').fill('correct horse')
  await page.getByRole('button', { name: 'Sign up' }).click()

  const loggedIn = page.getByText(`Logged in as ${mobile.slice(0, 3)}****${mobile.slice(-4)}`)
  await loggedIn.waitFor()
  t.equal(await page.getByRole('status').innerText(), 'Registered')
  t.strictSame(await axeViolations(page), [])
  await page.reload()
  await loggedIn.waitFor()
  await page.getByRole('button', { name: 'Log out' }).click()
  await page.getByText('Logged out').waitFor()
  t.ok(await page.locator('#mobile').isVisible())
  t.notMatch(await page.content(), `****${mobile.slice(-4)}`, 'the page keeps nothing of the user')
  t.equal(await page.evaluate('localStorage.length'), 0)
  t.strictSame(errors, [], 'no error in the console, no request to another host')
})

t.test('a user logs in with a code that was sent for a sign-up, and deletes the account, on the page', async (t) => {
  const { app, page, errors } = await openPage(t, 'en-GB')
  const { mobile, ...body } = await signUpBody()
  await client(app).signUp({ mobile, ...body })
  const purposes: string[] = []
  page.on('request', (request) => {
    if (request.url().endsWith('/sms_codes')) purposes.push(request.postDataJSON().purpose)
  })
  const click = (name: string) => page.getByRole('button', { name }).click()
  async function requestCode() {
    await click('Send code')
    await page.getByRole('status').getByText('Sent').waitFor()
  }

  await page.locator('#mobile').fill(mobile)
  await requestCode()
  await page.locator('#sms_code').fill(await codeOf(mobile))
  const refusal = page.waitForResponse(/sms_codes/)
  await page.getByRole('radio', { name: 'Log in' }).check()
  t.equal((await refusal).status(), 429, 'it asks for the further purpose, not for a second message')
  t.ok(await page.locator('#password').isHidden())
  t.strictSame(await axeViolations(page), [])
  await click('Log in')
  await page.getByRole('status').getByText('Logged in').waitFor()
  t.notMatch(await page.content(), mobile, 'the page shows the mobile masked')

  // Instead of a minute.
  await redis.del(`send_sms_code_${mobile}`)
  await page.reload()
  await click('Delete account')
  t.strictSame(await axeViolations(page), [])
  await click('Delete account')
  await page.getByText('A required parameter is missing').waitFor()
  t.equal(await focusedId(page), 'sms_code')
  await requestCode()
  await page.locator('#sms_code').fill(await codeOf(mobile))
  await click('Delete account')
  await page.getByText('Account deleted').waitFor()
  t.equal(await focusedId(page), 'mobile')
  t.notMatch(await page.content(), `****${mobile.slice(-4)}`)
  t.strictSame(purposes, ['sign_up', 'log_in', 'delete'])
  t.equal((await page.request.get('/api/v1.0/session')).status(), 401)
  t.equal((await client(app).signUp(await signUpBody({ mobile }))).statusCode, 201, 'the mobile can sign up again')
  t.strictSame(errors, [])
})

t.test('errors are shown in the words of the service, with the focus on their field', async (t) => {
  const { app, page, errors } = await openPage(t, 'zh-CN')
  t.equal(await page.locator('html').getAttribute('lang'), 'zh-CN')
  const registered = await signUpBody()
  await client(app).signUp(registered)
  const mobile = newMobile()
  /** Returns the error that the page shows after the submission, and the id of the field with the focus. */
  async function submit(values: Record<string, string>) {
    for (const [name, value] of Object.entries(values)) await page.locator(`#${name}`).fill(value)
    await page.locator('#submit').click()
    await page.locator('#submit:not([aria-busy])').waitFor()
    return [await shownError(page), await focusedId(page)]
  }
  const valid = { mobile, sms_code: '123456', password: 'correct horse', password2: 'correct horse' }
  t.strictSame(await submit({}), ['参数不完整', 'mobile'])
  t.strictSame(await submit({ ...valid, mobile: '12345' }), ['手机号格式错误', 'mobile'])
  t.strictSame(await submit({ ...valid, password2: 'another one' }), ['两次密码不一致', 'password2'])
  t.strictSame(await submit({ ...valid, password: 'short', password2: 'short' }), ['密码须为8至128个字符', 'password'])
  t.strictSame(await submit({ ...valid, password: 'password', password2: 'password' }), ['密码过于常见', 'password'])
  t.strictSame(await submit(valid), ['短信验证码错误', 'sms_code'])
  t.strictSame(await axeViolations(page), [])
  const { sms_code } = await signUpBody({ mobile: registered.mobile })
  t.strictSame(await submit({ ...valid, mobile: registered.mobile, sms_code }), ['手机号已存在', 'mobile'])
  await page.locator('#language').click()
  const invalidMobile = await submit({ ...valid, mobile: '<b>1</b>' })
  t.strictSame(invalidMobile, ['Invalid mobile number', 'mobile'], 'in the other language')

  await redis.set(`send_sms_code_${mobile}`, '1', 'EX', 40)
  await page.locator('#mobile').fill(mobile)
  await page.locator('#send').click()
  // From the Retry-After of the 429, at most 40 s. The page would count from 60 after a success.
  await page.getByRole('button', { name: /Again in (40|[1-3]?\d) s/ }).waitFor()
  t.equal(await shownError(page), 'Too many requests')
  t.strictSame(errors, [])

  await app.close()
  await page.locator('#submit').click()
  await page.getByText('The service gave no answer. Please try again.').waitFor()
})

t.test('the page sends its ticket, and shows how long a refused sign-up has to wait', async (t) => {
  const { page } = await openPage(t, 'en-GB', { SMS_CODE_ATTEMPTS: '1', SMS_RESEND_S: '0' })
  const mobile = newMobile()
  const submit = page.locator('#submit')
  async function requestCode() {
    await page.locator('#mobile').fill(mobile)
    await page.locator('#send').click()
    await page.getByText('Sent', { exact: true }).waitFor()
  }
  await requestCode()
  await page.locator('#sms_code').fill((await codeOf(mobile)) === '000000' ? '111111' : '000000')
  await page.locator('#password').fill('correct horse')
  await page.locator('#password2').fill('correct horse')
  await submit.click()
  await page.getByText('Wrong SMS code').waitFor()
  t.match((await redis.hkeys(`{sms_code_${mobile}}:guesses`)).join(), /^ticket:/)
  await submit.click()
  await page.getByRole('button', { name: /^Again in \d+ s$/ }).waitFor()
  t.equal(await shownError(page), 'Too many requests')
  t.ok(await submit.isDisabled())

  await requestCode()
  t.ok(await submit.isEnabled(), 'a new ticket has tries of its own')
  await page.locator('#sms_code').fill(await codeOf(mobile))
  await submit.click()
  await page.getByText('Registered').waitFor()
})

t.test('the keyboard suffices, on a small screen and below another prefix', async (t) => {
  const { page, errors } = await openPage(t, 'zh-CN', { API_PREFIX: '/other' })
  await page.setViewportSize({ width: 360, height: 640 })
  const isScrolling = () => page.evaluate('document.documentElement.scrollWidth > innerWidth')
  t.notOk(await isScrolling(), 'no horizontal scrolling')
  const mobile = newMobile()
  const press = async (...keys: string[]) => {
    for (const key of keys) await page.keyboard.press(key)
  }
  await page.locator('#language').focus()
  await press('Tab', 'ArrowRight')
  t.equal(await page.locator('h1').innerText(), '登录')
  await press('ArrowLeft', 'Tab')
  await page.keyboard.type(mobile)
  await press('Tab', 'Tab', 'Enter')
  await page.getByText('发送成功').waitFor()
  t.equal(await focusedId(page), 'sms_code')
  await page.keyboard.type(await codeOf(mobile))
  // The focus skips the button with the countdown, which is disabled.
  await press('Tab')
  await page.keyboard.type('correct horse')
  await press('Tab')
  await page.keyboard.type('correct horse')
  await press('Enter')
  await page.getByText('注册成功').waitFor()
  t.equal(await focusedId(page), 'who')
  t.notOk(await isScrolling())
  await press('Tab', 'Tab', 'Enter')
  t.equal(await focusedId(page), 'sms_code')
  await press('Tab', 'Tab', 'Enter')
  t.equal(await focusedId(page), 'delete', 'the deletion is cancelled')
  await press('Shift+Tab', 'Enter')
  await page.getByText('退出成功').waitFor()
  t.strictSame(errors, [])
})

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

t.test(
  'the service has neither page unless it is told to, and a strict policy protects the sign-up page',
  async (t) => {
    const app = await build(t, { DOCS: 'false' })
    for (const path of ['/', '/docs', '/docs/', '/docs/static/index.html']) {
      t.strictSame(statusAndErrno(await app.inject(path)), [404, '4201'])
    }
    t.equal((await app.inject('/openapi.json')).statusCode, 200)
    const { headers } = await (await build(t, {}, withPage)).inject('/')
    t.match(headers, {
      'content-type': 'text/html; charset=utf-8',
      'cache-control': 'no-store',
      'x-content-type-options': 'nosniff',
      'content-security-policy': /default-src 'none'.*frame-ancestors 'none'; script-src 'sha256-/
    })
    t.notMatch(headers['content-security-policy'], /unsafe/)
  }
)

t.test('the example of a webhook delivers codes; what its provider refuses stops no other message', async (t) => {
  const sent: SmsMessage[] = []
  const [refused, failing, mobile] = [newMobile(), newMobile(), newMobile()]
  const sendSms = async (message: SmsMessage) => {
    if (message.mobile === refused) throw new MessageRefused()
    if (message.mobile === failing) throw new Error('the provider is away')
    sent.push(message)
  }
  const secret = 'the secret of the webhook'
  const url = `${await listen(t, createWebhook({ secret, sendSms }))}/`
  const app = await build(t, { SMS_WEBHOOK_URL: url, SMS_WEBHOOK_SECRET: secret, SMS_RESEND_S: '0' })
  const { sendCode } = client(app)
  for (let n = 0; n < 6; n++) t.strictSame(statusAndErrno(await sendCode(refused)), [503, '4301'])
  t.strictSame(statusAndErrno(await sendCode(failing)), [503, '4301'])
  t.equal((await sendCode(mobile)).statusCode, 202)
  t.match(sent, [{ mobile, code: await redis.get(`sms_code_${mobile}`), ttlSeconds: 300 }])

  const sign = (text: string, minutesAgo = 0, key = secret) => {
    const sentAt = new Date(Date.now() - minutesAgo * 60_000)
    return {
      'webhook-id': 'one',
      'webhook-timestamp': `${Math.floor(sentAt.getTime() / 1_000)}`,
      'webhook-signature': new Webhook(key, { format: 'raw' }).sign('one', sentAt, text)
    }
  }
  const body = JSON.stringify({ mobile, code: '123456', ttl_s: 300, id: 'one' })
  const large = ' '.repeat(5_000)
  for (const [status, text, headers] of [
    [204, body, sign(body)],
    // The same id: it is not sent again.
    [204, body, sign(body)],
    [401, body, sign(body, 0, 'another secret')],
    [401, body, sign(`${body} `)],
    [401, body, sign(body, 60)],
    [400, '{}', sign('{}')],
    [413, large, sign(large)]
  ] as const)
    t.equal((await fetch(url, { method: 'POST', headers, body: text })).status, status)
  t.equal(sent.length, 2)
})
