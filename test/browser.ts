import { chromium, type Page } from 'playwright-core'
import type { Test } from 'tap'
import { findProgram } from '../src/dev/programs.js'

/** The browsers that `npm run setup:test` knows; it installs the first where there is none. */
const programs = ['chromium', 'chromium-browser', 'google-chrome']

/** Quiet and at home: a browser's own services look for hosts that are not the page's. */
const flags = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking']

/** A page, and what must not happen on it. */
export interface Visit {
  page: Page
  /** Errors in the console, exceptions that nobody caught, and requests to another host than the service's. */
  faults: string[]
}

/**
 * A new page of a real Chromium, closed after the test.
 *
 * @param origin of the service, as `http://127.0.0.1:3000`
 */
export async function visit(t: Test, origin: string, locale = 'zh-CN'): Promise<Visit> {
  const executablePath = findProgram(...programs)
  if (executablePath === undefined) throw new Error('no Chromium is on the PATH: run npm run setup:test')
  const browser = await chromium.launch({ executablePath, args: flags })
  t.teardown(() => browser.close())
  const page = await browser.newPage({ baseURL: origin, locale, viewport: { width: 1_280, height: 900 } })
  const faults: string[] = []
  page.on('pageerror', ({ message }) => faults.push(message))
  page.on('console', (message) => {
    // Chromium reports each refusal of the service as an error of its own.
    const isRefusal = message.text().startsWith('Failed to load resource') && message.location().url.includes('/api/')
    if (message.type() === 'error' && !isRefusal) faults.push(message.text())
  })
  page.on('request', (request) => {
    const url = new URL(request.url())
    if (url.origin !== origin && !['data:', 'blob:'].includes(url.protocol)) faults.push(`a request to ${url.origin}`)
  })
  return { page, faults }
}
