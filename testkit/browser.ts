import { chromium } from 'playwright-core'
import type { Test } from 'tap'
import { findProgram } from '../dev/programs.js'

/** The browsers that `npm run setup:test` looks for. If there is none, it installs the first that is a package. */
const programs = ['chromium-headless-shell', 'chromium', 'chromium-browser', 'google-chrome']

/** Without a sandbox, because tests also run as root in containers, and without the browser's own requests to other hosts. */
const flags = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking']

/** As long as `until()` waits. Playwright's 30 s are short for a busy machine. */
const timeoutMs = 60_000

/** Starts Chromium for a test file, and stops it at the end of the file. */
export async function startBrowser(t: Test) {
  const executablePath = findProgram(...programs)
  if (executablePath === undefined) throw new Error('no Chromium is on the PATH: run npm run setup:test')
  const browser = await chromium.launch({ executablePath, args: flags })
  t.teardown(() => browser.close())

  /**
   * Opens a page with cookies and storage of its own, and closes it after the test.
   *
   * @param origin of the service, for example `http://127.0.0.1:3000`
   * @returns the page, and its errors: also those in the console, and requests to other hosts
   */
  async function visit(t: Test, origin: string, locale = 'zh-CN') {
    const context = await browser.newContext({ baseURL: origin, locale, viewport: { width: 1_280, height: 900 } })
    t.teardown(() => context.close())
    context.setDefaultTimeout(timeoutMs)
    const page = await context.newPage()
    const errors: string[] = []
    page.on('pageerror', ({ message }) => errors.push(message))
    page.on('console', (message) => {
      // Chromium also logs every 4xx and 5xx of the API as an error.
      const isRefusal = message.text().startsWith('Failed to load resource') && message.location().url.includes('/api/')
      if (message.type() === 'error' && !isRefusal) errors.push(message.text())
    })
    page.on('request', (request) => {
      const url = new URL(request.url())
      if (url.origin !== origin && !['data:', 'blob:'].includes(url.protocol)) errors.push(`a request to ${url.origin}`)
    })
    return { page, errors }
  }

  return { visit }
}
