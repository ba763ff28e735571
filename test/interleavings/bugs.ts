import type { FastifyInstance } from 'fastify'
import type { Hold } from '#src/codes/codes.js'
import { insertUser } from '#src/users/users.js'
import { claimKey } from '../../testkit/testbed.js'
import type { scenarios } from './scenarios.js'
import { editClaim } from './scheduler.js'

type Service = FastifyInstance['mobileSignup']

/** A bug that the search must find. */
export interface Bug {
  breaks: `G${number}`
  /** The one that shows it with the fewest deviations. To search all would take minutes. */
  scenario: keyof typeof scenarios
  plant(service: Service): void
}

/** Does something before a request presents its code, and changes what it learns when it holds the code. */
function changeHold({ codes }: Service, change: Partial<Hold>, before?: (mobile: string) => Promise<unknown>): void {
  const { hold } = codes
  codes.hold = async (request, purpose) => {
    await before?.(request.body.mobile)
    const held = await hold(request, purpose)
    return held === 'used_in_vain' ? held : { ...held, ...change }
  }
}

/** Does something before a request releases its code. */
function beforeRelease({ codes }: Service, before: (hold: Hold) => Promise<unknown>): void {
  const { release } = codes
  codes.release = (hold, ...rest) => before(hold).then(() => release(hold, ...rest))
}

export const bugs: Record<string, Bug> = {
  'a release puts the code back': {
    breaks: 'G1',
    scenario: 'one client that retries',
    plant: (service) =>
      beforeRelease(service, ({ mobile }) => service.redis.run((redis) => redis.set(`sms_code_${mobile}`, '123456')))
  },
  'a used code resets the password again': {
    breaks: 'G1',
    scenario: 'two resets',
    plant: (service) => changeHold(service, { usedBy: undefined })
  },
  'a sign-up replaces the row that another one has inserted': {
    breaks: 'G2',
    scenario: 'two slow requests with two passwords',
    plant({ users, postgres }) {
      const { name, text } = insertUser(false)
      const statement = { name, text: text.replace('DO NOTHING', 'DO UPDATE SET password_hash = $2') }
      const upsert = (values: string[]) => postgres.query<{ id: string }>(statement, values)
      users.insert = async (...values) => (await upsert(values)).rows[0]?.id
    }
  },
  'an INSERT without an answer counts as written': {
    breaks: 'G3',
    scenario: 'one client that retries',
    plant({ users }) {
      const { insert } = users
      users.insert = (mobile, passwordHash) => insert(mobile, passwordHash).catch(() => '1')
    }
  },
  'a code is deleted in one step, and its claim is written in the next': {
    breaks: 'G4',
    scenario: 'one client that retries',
    plant: (service) =>
      changeHold(service, {}, async (mobile) => {
        const key = `sms_code_${mobile}`
        const code = await service.redis.run((redis) => redis.getdel(key))
        if (code !== null) await service.redis.run((redis) => redis.set(key, code, 'EX', 3_600))
      })
  },
  'a lease never ends': {
    breaks: 'G5',
    scenario: 'one client that retries',
    plant(service) {
      const extend = (until: number) => ({ until: until > 0 ? Number.MAX_SAFE_INTEGER : 0 })
      changeHold(service, {}, (mobile) => service.redis.run((redis) => editClaim(redis, claimKey(mobile), extend)))
    }
  },
  'a request that takes over the code of a dead one does not look for its row': {
    breaks: 'G5',
    scenario: 'one client that retries',
    plant: (service) => changeHold(service, { mayHaveWritten: false })
  },
  'a request releases a code that another one holds': {
    breaks: 'G5',
    scenario: 'two slow requests with two passwords',
    plant: (service) =>
      beforeRelease(service, ({ mobile, holder }) =>
        service.redis.run((redis) => editClaim(redis, claimKey(mobile), () => ({ holder })))
      )
  },
  'a reset does not end the earlier sessions': {
    breaks: 'G9',
    scenario: 'two slow resets',
    plant: ({ sessions }) => Object.assign(sessions, { endBefore: async () => undefined })
  }
}
