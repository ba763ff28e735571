import type { AddressInfo } from 'node:net'
import axe from 'axe-core'
import type { Page } from 'playwright-core'
import t, { type Test } from 'tap'
import type { Environment } from '../src/config/config.js'
import { visit } from './browser.js'
import { brief, build, newMobile, post, redis, signUpBody, testConfig } from './helper.js'

/** The page of a service that brings its own stores, in a real Chromium. */
async function open(t: Test, locale: string, env: Environment = {}) {
  const app = await build(t, {}, { ...testConfig(env), embedded: true })
  await app.listen({ port: 0, host: '127.0.0.1' })
  const { port } = app.server.address() as AddressInfo
  const { page, faults } = await visit(t, `http://127.0.0.1:${port}`, locale)
  await page.goto('/')
  return { app, page, faults }
}

const error = (page: Page) => page.getByRole('alert').innerText()

/** Sends a code by the page, and reads it where the page says that it is: in the log, or, here, in Redis. */
async function fetchCode(page: Page, mobile: string, button: string): Promise<string> {
  await page.locator('#mobile').fill(mobile)
  await page.getByRole('button', { name: button }).click()
  await page.getByRole('status').getByText(/./).waitFor()
  return `${await redis.get(`sms_code_${mobile}`)}`
}

/** What axe finds to be in the way of people, in both colour schemes. */
async function barriers(page: Page): Promise<string[]> {
  const found: string[] = []
  for (const colorScheme of ['light', 'dark'] as const) {
    await page.emulateMedia({ colorScheme, reducedMotion: 'reduce' })
    await page.evaluate(axe.source)
    const violations: string[] = await page.evaluate(
      'axe.run().then(({ violations }) => violations.map(({ id }) => id))'
    )
    found.push(...violations)
  }
  return found
}

for (const [locale, words] of [
  [
    'zh-CN',
    {
      send: '获取验证码',
      sent: '发送成功',
      again: /\d+ 秒后重发/,
      submit: '注册',
      who: '已登录：',
      out: '退出',
      done: '注册成功',
      left: '退出成功'
    }
  ],
  [
    'en-GB',
    {
      send: 'Send code',
      sent: 'Sent',
      again: /Again in \d+ s/,
      submit: 'Sign up',
      who: 'Logged in as ',
      out: 'Log out',
      done: 'Registered',
      left: 'Logged out'
    }
  ]
] as const) {
  t.test(`the whole journey on the page, in ${locale}, with no barrier that axe knows`, async (t) => {
    const { page, faults } = await open(t, locale)
    const mobile = newMobile()
    t.equal(await page.locator('html').getAttribute('lang'), locale === 'zh-CN' ? 'zh-CN' : 'en')
    t.strictSame(await barriers(page), [])

    const code = await fetchCode(page, mobile, words.send)
    t.equal(await page.getByRole('status').innerText(), words.sent)
    t.ok(await page.getByRole('button', { name: words.again }).isDisabled(), 'with a countdown')
    await page.locator('#sms_code').fill(code)
    await page.locator('#password').fill('correct horse')
    await page.locator('#password2').fill('correct horse')
    await page.getByRole('button', { name: words.submit }).click()

    const who = `${words.who}${mobile.slice(0, 3)}****${mobile.slice(-4)}`
    await page.getByText(who).waitFor()
    t.equal(await page.getByRole('status').innerText(), words.done)
    t.strictSame(await barriers(page), [])
    await page.reload()
    await page.getByText(who).waitFor()
    await page.getByRole('button', { name: words.out }).click()
    await page.getByText(words.left).waitFor()
    t.ok(await page.locator('#mobile').isVisible())
    t.strictSame(faults, [], 'no error in the console, no request to another host')
  })
}

t.test('errors stand there as the service words them, and lead to their field', async (t) => {
  const { app, page, faults } = await open(t, 'zh-CN')
  const taken = await signUpBody()
  await post(app, taken)
  const mobile = newMobile()
  const fill = async (values: Record<string, string>) => {
    for (const [name, value] of Object.entries(values)) await page.locator(`#${name}`).fill(value)
    await page.locator('#submit').click()
    await page.locator('#submit:not([aria-busy])').waitFor()
    return [await error(page), await page.evaluate('document.activeElement.id')]
  }
  const good = { mobile, sms_code: '123456', password: 'correct horse', password2: 'correct horse' }
  t.strictSame(await fill({}), ['参数不完整', 'mobile'])
  t.strictSame(await fill({ ...good, mobile: '12345' }), ['手机号格式错误', 'mobile'])
  t.strictSame(await fill({ ...good, password2: 'another one' }), ['两次密码不一致', 'password2'])
  t.strictSame(await fill({ ...good, password: 'short', password2: 'short' }), ['密码须为8至128个字符', 'password'])
  t.strictSame(await fill({ ...good, password: 'password', password2: 'password' }), ['密码过于常见', 'password'])
  t.strictSame(await fill(good), ['短信验证码错误', 'sms_code'])
  t.strictSame(await barriers(page), [])
  const { sms_code } = await signUpBody({ mobile: taken.mobile })
  t.strictSame(await fill({ ...good, mobile: taken.mobile, sms_code }), ['手机号已存在', 'mobile'])
  await page.locator('#language').click()
  t.strictSame(
    await fill({ ...good, mobile: '<b>1</b>' }),
    ['Invalid mobile number', 'mobile'],
    'in the other language'
  )

  await redis.set(`send_sms_code_${mobile}`, '1', 'EX', 40)
  await page.locator('#mobile').fill(mobile)
  await page.locator('#send').click()
  await page.getByRole('button', { name: /Again in (40|39) s/ }).waitFor()
  t.equal(await error(page), 'Too many requests')
  t.strictSame(faults, [])

  await app.close()
  await page.locator('#submit').click()
  await page.getByText('The service gave no answer. Please try again.').waitFor()
})

t.test('it is done with the keyboard alone, on the smallest of screens, below any prefix', async (t) => {
  const { page, faults } = await open(t, 'zh-CN', { API_PREFIX: '/other' })
  await page.setViewportSize({ width: 360, height: 640 })
  t.ok(await page.evaluate('document.documentElement.scrollWidth <= innerWidth'), 'without scrolling sideways')
  const mobile = newMobile()
  const press = async (...keys: string[]) => {
    for (const key of keys) await page.keyboard.press(key)
  }
  await page.locator('#language').focus()
  await press('Tab')
  await page.keyboard.type(mobile)
  await press('Tab', 'Tab', 'Enter')
  await page.getByText('发送成功').waitFor()
  t.equal(await page.evaluate('document.activeElement.id'), 'sms_code')
  await page.keyboard.type(`${await redis.get(`sms_code_${mobile}`)}`)
  // The button with the countdown is passed over.
  await press('Tab')
  await page.keyboard.type('correct horse')
  await press('Tab')
  await page.keyboard.type('correct horse')
  await press('Enter')
  await page.getByText('注册成功').waitFor()
  t.equal(await page.evaluate('document.activeElement.id'), 'who')
  await press('Tab', 'Enter')
  await page.getByText('退出成功').waitFor()
  t.strictSame(faults, [])
})

t.test('there is no page where the stores are not its own; the page lets nothing else in', async (t) => {
  t.strictSame(brief(await (await build(t)).inject('/')), [404, '4201'])
  const app = await build(t, {}, { ...testConfig(), embedded: true })
  const { headers } = await app.inject('/')
  t.match(headers, {
    'content-type': 'text/html; charset=utf-8',
    'cache-control': 'no-store',
    'x-content-type-options': 'nosniff'
  })
  t.match(headers['content-security-policy'], /default-src 'none'/)
  t.notMatch(headers['content-security-policy'], /unsafe/)
})
