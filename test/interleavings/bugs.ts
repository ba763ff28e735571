import type { FastifyInstance } from 'fastify'
import type { scenarios } from './scenarios.js'
import type { LuaChange } from './system.js'

/** A bug that the search must find. */
interface Bug {
  /** The one that shows it with the fewest deviations. To search all would take minutes. */
  scenario: keyof typeof scenarios
  lua?: LuaChange
  change?(service: FastifyInstance['mobileSignup']): void
}

export const bugs: Record<string, Bug> = {
  'a request releases a code that another one holds': {
    scenario: 'two slow requests with two passwords',
    lua: ['releaseCode', 'if claim.holder ~= holder then return nil end', '']
  },
  'the lease is compared the wrong way': {
    scenario: 'one client that retries',
    lua: ['holdCode', `claim['until'] > now`, `claim['until'] < now`]
  },
  'a request that takes over the code of a dead one does not look for its row': {
    scenario: 'one client that retries',
    lua: ['holdCode', '(claim.may_have_written or was_never_released)', 'claim.may_have_written']
  },
  'the code is taken in one step, and its claim written in another': {
    scenario: 'one client that retries',
    lua: ['holdCode', `redis.call('SET', claim_key,`, `redis.call('SET', claim_key .. ':next',`],
    change({ codes, redis }) {
      const { hold } = codes
      codes.hold = async (request, purpose) => {
        const held = await hold(request, purpose)
        const claim = `{sms_code_${request.body.mobile}}:claim`
        await redis.run((client) => client.rename(`${claim}:next`, claim))
        return held
      }
    }
  },
  'the budget of wrong codes is checked after the code': {
    scenario: 'one wrong code left',
    lua: ['holdCode', 'if wait > 0 then', `if wait > 0 and redis.call('GET', KEYS[1]) ~= ARGV[1] then`]
  },
  'the claim of a newer code does not replace that of an older one': {
    scenario: 'two sign-ups, one with a new code',
    lua: ['holdCode', '  claim = { code', '  claim = stored and claim or { code']
  },
  'a release puts the code back': {
    scenario: 'one client that retries',
    lua: ['releaseCode', `local sends = ''`, `local sends = '' redis.call('SET', KEYS[1]:sub(2, -8), claim.code)`]
  },
  'one code tries any number of passwords': {
    scenario: 'two passwords for one code',
    lua: ['releaseCode', 'claim.wrong_passwords == 2', 'false']
  },
  'a repeat does not verify the password': {
    scenario: 'two passwords for one code',
    change({ passwords }) {
      passwords.verify = async () => true
    }
  },
  'a success does not use the code up': {
    scenario: 'two passwords for one code',
    change({ codes }) {
      const { release } = codes
      codes.release = (hold, how, userId) => release(hold, how === 'used' ? 'unused' : how, userId)
    }
  },
  'a used code resets the password again': {
    scenario: 'two resets',
    change({ codes }) {
      const { hold } = codes
      codes.hold = async (request, purpose) => {
        const held = await hold(request, purpose)
        return held === 'used_in_vain' ? held : { ...held, usedBy: undefined }
      }
    }
  },
  'an INSERT without an answer counts as written': {
    scenario: 'one client that retries',
    change({ users }) {
      const { insert } = users
      users.insert = (mobile, passwordHash) => insert(mobile, passwordHash).catch(() => '1')
    }
  },
  'a session that is not stored counts as started': {
    scenario: 'one client that retries',
    change({ sessions }) {
      const { tryStart } = sessions
      sessions.tryStart = async (...args) => {
        await tryStart(...args)
        return true
      }
    }
  },
  'a reset does not end the earlier sessions': {
    scenario: 'two slow resets',
    change({ sessions }) {
      sessions.endBefore = async () => undefined
    }
  }
}
