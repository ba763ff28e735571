import type { FastifyInstance } from 'fastify'
import type { Redis } from 'ioredis'
import type { Hold } from '#src/codes/codes.js'
import { claimKey } from '../../testkit/testbed.js'
import type { RedisClient } from './requests.js'
import type { scenarios } from './scenarios.js'

/** A bug that the search must find. */
export interface Bug {
  /** The one that shows it with the fewest deviations. To search all would take minutes. */
  scenario: keyof typeof scenarios
  /** Changes the service. */
  plant: Plant
}

interface StoredClaim {
  code: string
  holder?: string | undefined
  until: number
  wrong_passwords?: number
}

/** Changes the claim under a key, if there is one. */
export async function editClaim(
  redis: Pick<Redis, 'get' | 'set'>,
  key: string,
  edit: (claim: StoredClaim) => Partial<StoredClaim>
): Promise<void> {
  const stored = await redis.get(key)
  if (stored === null) return
  const claim = JSON.parse(stored)
  await redis.set(key, JSON.stringify({ ...claim, ...edit(claim) }), 'KEEPTTL')
}

type Plant = (service: FastifyInstance['mobileSignup'], client: RedisClient) => void
type Script = (keyCount: number, ...keysAndArgs: (string | number)[]) => Promise<unknown>
type Around = (client: RedisClient, keys: string[], args: string[], run: () => Promise<unknown>) => Promise<unknown>

/** Does something before or after a script, in the same step. */
function around(name: 'holdCode' | 'releaseCode', change: Around): Plant {
  return (_, client) => {
    const script: Script = client[name].bind(client)
    const replacement: Script = (keyCount, ...rest) => {
      const texts = rest.map(String)
      return change(client, texts.slice(0, keyCount), texts.slice(keyCount), () => script(keyCount, ...rest))
    }
    Object.assign(client, { [name]: replacement })
  }
}

/** Changes the claim before a script. */
const editBefore = (name: 'holdCode' | 'releaseCode', edit: (claim: StoredClaim) => Partial<StoredClaim>) =>
  around(name, async (client, keys, _args, run) => {
    await editClaim(client, keys.find((key) => key.endsWith(':claim')) ?? '', edit)
    return run()
  })

/** Changes what a request learns that holds a code. */
function changeHold(change: Partial<Hold>): Plant {
  return ({ codes }) => {
    const { hold } = codes
    codes.hold = async (...args) => {
      const held = await hold(...args)
      return held === 'used_in_vain' ? held : { ...held, ...change }
    }
  }
}

export const bugs: Record<string, Bug> = {
  'a request releases a code that another one holds': {
    scenario: 'two slow requests with two passwords',
    plant: around('releaseCode', async (client, [claim = ''], [holder = ''], run) => {
      await editClaim(client, claim, () => ({ holder }))
      return run()
    })
  },
  'a lease never ends': {
    scenario: 'one client that retries',
    plant: editBefore('holdCode', ({ until }) => ({ until: until > 0 ? Number.MAX_SAFE_INTEGER : 0 }))
  },
  'a request that takes over the code of a dead one does not look for its row': {
    scenario: 'one client that retries',
    plant: changeHold({ mayHaveWritten: false })
  },
  'the code is taken in one step, and its claim written in another': {
    scenario: 'one client that retries',
    plant(service, client) {
      const moveClaim = around('holdCode', async (client, [, claim = ''], _args, run) => {
        const reply = await run()
        if (`${reply}`.startsWith('held')) await client.rename(claim, `${claim}:next`)
        return reply
      })
      moveClaim(service, client)
      const { codes, redis } = service
      const { hold } = codes
      codes.hold = async (request, purpose) => {
        const held = await hold(request, purpose)
        const claim = claimKey(request.body.mobile)
        if (held !== 'used_in_vain') await redis.run((client) => client.rename(`${claim}:next`, claim))
        return held
      }
    }
  },
  'the budget of wrong codes is checked after the code': {
    scenario: 'one wrong code left',
    plant: around('holdCode', async (client, [code = '', , , guesses = ''], [presented], run) => {
      if ((await client.get(code)) === presented) await client.del(guesses)
      return run()
    })
  },
  'the claim of a newer code does not replace that of an older one': {
    scenario: 'two sign-ups, one with a new code',
    plant: around('holdCode', async (client, [, claim = ''], _args, run) => {
      const former = JSON.parse((await client.get(claim)) ?? '{}')
      const reply = await run()
      await editClaim(client, claim, ({ holder, until }) => ({ ...former, holder, until }))
      return reply
    })
  },
  'a release puts the code back': {
    scenario: 'one client that retries',
    plant: around('releaseCode', async (client, [claim = ''], _args, run) => {
      const { code } = JSON.parse((await client.get(claim)) ?? '{}')
      if (code) await client.set(claim.slice('{'.length, -'}:claim'.length), code)
      return run()
    })
  },
  'one code tries any number of passwords': {
    scenario: 'two passwords for one code',
    plant: editBefore('releaseCode', () => ({ wrong_passwords: 0 }))
  },
  'a repeat does not verify the password': {
    scenario: 'two passwords for one code',
    plant: ({ passwords }) => Object.assign(passwords, { verify: async () => true })
  },
  'a success does not use the code up': {
    scenario: 'two passwords for one code',
    plant({ codes }) {
      const { release } = codes
      codes.release = (hold, how, userId) => release(hold, how === 'used' ? 'unused' : how, userId)
    }
  },
  'a used code resets the password again': { scenario: 'two resets', plant: changeHold({ usedBy: undefined }) },
  'an INSERT without an answer counts as written': {
    scenario: 'one client that retries',
    plant({ users }) {
      const { insert } = users
      users.insert = (mobile, passwordHash) => insert(mobile, passwordHash).catch(() => '1')
    }
  },
  'a session that is not stored counts as started': {
    scenario: 'one client that retries',
    plant({ sessions }) {
      const { tryStart } = sessions
      sessions.tryStart = async (...args) => (await tryStart(...args)) || true
    }
  },
  'a reset does not end the earlier sessions': {
    scenario: 'two slow resets',
    plant: ({ sessions }) => Object.assign(sessions, { endBefore: async () => undefined })
  }
}
