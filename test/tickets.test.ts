import { createHmac, hkdfSync } from 'node:crypto'
import t from 'tap'
import { Tickets, ticketMaxLength } from '#src/codes/tickets.js'

/*
 * Which tickets are valid. test/strangers.test.ts has what a valid one is good for.
 */

const [secret, newerSecret] = ['a secret of at least thirty-two characters', 'a newer secret of thirty-two characters']
const tickets = new Tickets([secret])
const [mobile, otherMobile] = ['13900001111', '13900002222']

const hourMs = 3_600_000

t.test('a ticket is valid for its mobile and for one hour', async (t) => {
  let now = 1_800_000_000_000
  t.intercept(Date, 'now', { value: () => now })
  const ticket = tickets.issue(mobile)
  const [id, expiry = ''] = ticket.split('.')
  t.match(ticket, /^[\w-]{12}\.[0-9a-z]+\.[\w-]{43}$/)
  t.ok(ticket.length <= ticketMaxLength)
  t.equal(Number.parseInt(expiry, 36), now + hourMs)
  t.equal(tickets.verify(ticket, mobile), id)
  t.equal(tickets.verify(ticket, otherMobile), undefined)
  now += hourMs - 1
  t.equal(tickets.verify(ticket, mobile), id)
  now += 1
  t.equal(tickets.verify(ticket, mobile), undefined)
})

t.test('tickets of other versions are valid: their format and key do not change', async (t) => {
  const claims = `an-id.${(Date.now() + hourMs).toString(36)}`
  const key = Buffer.from(hkdfSync('sha256', secret, '', 'mobile-signup: ticket', 32))
  const mac = createHmac('sha256', key).update(`${mobile}.${claims}`).digest('base64url')
  t.equal(tickets.verify(`${claims}.${mac}`, mobile), 'an-id')
})

t.test('each ticket has an id of its own', async (t) => {
  const ids = Array.from({ length: 100 }, () => tickets.issue(mobile).split('.')[0])
  t.equal(new Set(ids).size, 100)
})

t.test('no part of a ticket can be changed', async (t) => {
  const ticket = tickets.issue(mobile)
  const [id, expiry, mac = ''] = ticket.split('.')
  for (const forged of [
    `x${ticket}`,
    `${id}.z${expiry}.${mac}`,
    `${id}.${expiry}.${mac.startsWith('A') ? 'B' : 'A'}${mac.slice(1)}`,
    `${id}.${expiry}.${mac}AA`,
    `${id}.${expiry}.${mac.slice(2)}`,
    `${id}.${expiry}.`,
    `${id}.${expiry}`,
    `${id}`,
    '',
    '..'
  ]) {
    t.equal(tickets.verify(forged, mobile), undefined, forged)
  }
})

t.test('the newest secret signs, and all verify', async (t) => {
  const rotated = new Tickets([newerSecret, secret])
  const older = tickets.issue(mobile)
  const newer = rotated.issue(mobile)
  t.equal(rotated.verify(older, mobile), older.split('.')[0])
  t.equal(rotated.verify(newer, mobile), newer.split('.')[0])
  t.equal(new Tickets([newerSecret]).verify(newer, mobile), newer.split('.')[0])
  t.equal(tickets.verify(newer, mobile), undefined)
})
