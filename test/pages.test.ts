import axe from 'axe-core'
import type { Page } from 'playwright-core'
import t, { type Test } from 'tap'
import type { Environment } from '#src/config/config.js'
import { signUpPage } from '../dev/sign-up-page.js'
import { startBrowser } from '../testkit/browser.js'
import { client, statusAndErrno } from '../testkit/client.js'
import { startTestbed } from '../testkit/testbed.js'

const { build, redis, newMobile, signUpBody } = await startTestbed(t)
const { visit } = await startBrowser(t)

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

for (const [locale, language, texts] of [
  [
    'zh-CN',
    'zh-CN',
    {
      sendCode: '获取验证码',
      codeSent: '发送成功',
      countdown: /\d+ 秒后重发/,
      signUp: '注册',
      registered: '注册成功',
      loggedInAs: '已登录：',
      logOut: '退出',
      loggedOut: '退出成功'
    }
  ],
  [
    'en-GB',
    'en',
    {
      sendCode: 'Send code',
      codeSent: 'Sent',
      countdown: /Again in \d+ s/,
      signUp: 'Sign up',
      registered: 'Registered',
      loggedInAs: 'Logged in as ',
      logOut: 'Log out',
      loggedOut: 'Logged out'
    }
  ]
] as const) {
  t.test(`a user signs up and logs out in ${locale}, and axe finds no violation`, async (t) => {
    const { page, errors } = await openPage(t, locale)
    const mobile = newMobile()
    t.equal(await page.locator('html').getAttribute('lang'), language)
    t.strictSame(await axeViolations(page), [])

    await page.locator('#mobile').fill(mobile)
    await page.getByRole('button', { name: texts.sendCode }).click()
    await page.getByRole('status').getByText(/./).waitFor()
    t.equal(await page.getByRole('status').innerText(), texts.codeSent)
    t.ok(await page.getByRole('button', { name: texts.countdown }).isDisabled(), 'a countdown until the next code')
    await page.locator('#sms_code').fill(await codeOf(mobile))
    await page.locator('#password').fill('correct horse')
    await page.locator('#password2').fill('correct horse')
    await page.getByRole('button', { name: texts.signUp }).click()

    const loggedIn = page.getByText(`${texts.loggedInAs}${mobile.slice(0, 3)}****${mobile.slice(-4)}`)
    await loggedIn.waitFor()
    t.equal(await page.getByRole('status').innerText(), texts.registered)
    t.strictSame(await axeViolations(page), [])
    await page.reload()
    await loggedIn.waitFor()
    await page.getByRole('button', { name: texts.logOut }).click()
    await page.getByText(texts.loggedOut).waitFor()
    t.ok(await page.locator('#mobile').isVisible())
    t.notMatch(await page.content(), `****${mobile.slice(-4)}`, 'the page keeps nothing of the user')
    t.equal(await page.evaluate('localStorage.length'), 0)
    t.strictSame(errors, [], 'no error in the console, no request to another host')
  })
}

t.test('errors are shown in the words of the service, with the focus on their field', async (t) => {
  const { app, page, errors } = await openPage(t, 'zh-CN')
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

t.test('the keyboard suffices to sign up, on a small screen and below another prefix', async (t) => {
  const { page, errors } = await openPage(t, 'zh-CN', { API_PREFIX: '/other' })
  await page.setViewportSize({ width: 360, height: 640 })
  t.ok(await page.evaluate('document.documentElement.scrollWidth <= innerWidth'), 'no horizontal scrolling')
  const mobile = newMobile()
  const press = async (...keys: string[]) => {
    for (const key of keys) await page.keyboard.press(key)
  }
  await page.locator('#language').focus()
  await press('Tab')
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
  await press('Tab', 'Enter')
  await page.getByText('退出成功').waitFor()
  t.strictSame(errors, [])
})

t.test('the service has no sign-up page of its own, and a strict policy protects that of npm start', async (t) => {
  t.strictSame(statusAndErrno(await (await build(t)).inject('/')), [404, '4201'])
  const { headers } = await (await build(t, {}, withPage)).inject('/')
  t.match(headers, {
    'content-type': 'text/html; charset=utf-8',
    'cache-control': 'no-store',
    'x-content-type-options': 'nosniff'
  })
  t.match(headers['content-security-policy'], /default-src 'none'.*frame-ancestors 'none'; script-src 'sha256-/)
  t.notMatch(headers['content-security-policy'], /unsafe/)
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

t.test('DOCS=false removes the page and keeps /openapi.json', async (t) => {
  const app = await build(t, { DOCS: 'false' })
  for (const path of ['/docs', '/docs/', '/docs/static/index.html']) {
    t.strictSame(statusAndErrno(await app.inject(path)), [404, '4201'])
  }
  t.equal((await app.inject('/openapi.json')).statusCode, 200)
})
