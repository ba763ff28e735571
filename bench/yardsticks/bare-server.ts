/*
 * The yardstick of everything but the hash: a sign-up on node:http without a framework. It makes the round trips that every
 * sign-up needs, to the same stores, validates nothing and hashes nothing. Prints its URL when it listens.
 */
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import { Redis } from 'ioredis'
import pg from 'pg'
import { insertUser } from '../../dist/users/users.js'

const redis = new Redis(process.env.REDIS_URL ?? '')
const pool = new pg.Pool({ connectionString: process.env.DATABASE_URL ?? '', max: 10 })

/** As long as a hash of the service. */
const constantPhc = '$argon2id$v=19$m=19456,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA'

interface SignUpReply {
  status: number
  sessionId: string
  body: string
}

async function signUp(body: string): Promise<SignUpReply> {
  const { mobile, sms_code } = JSON.parse(body)
  if ((await redis.getdel(`sms_code_${mobile}`)) !== sms_code) return { status: 422, sessionId: '', body: '{}' }
  const { rows } = await pool.query({ ...insertUser, values: [mobile, constantPhc] })
  if (rows.length === 0) return { status: 409, sessionId: '', body: '{}' }
  const sessionId = randomBytes(24).toString('base64url')
  const user = { user_id: rows[0].id, name: mobile, mobile }
  await redis.set(`session:${sessionId}`, JSON.stringify(user), 'EX', 86_400)
  return {
    status: 201,
    sessionId,
    body: JSON.stringify({ errno: '0', errmsg: '注册成功', data: { ...user, session: true } })
  }
}

function handle(request: IncomingMessage, response: ServerResponse): void {
  let requestBody = ''
  request.setEncoding('utf8')
  request.on('data', (chunk) => {
    requestBody += chunk
  })
  request.on('end', async () => {
    const { status, sessionId, body } = await signUp(requestBody)
    response
      .writeHead(status, {
        'content-type': 'application/json; charset=utf-8',
        'content-length': Buffer.byteLength(body),
        'set-cookie': `sid=${sessionId}; Path=/; HttpOnly`
      })
      .end(body)
  })
}

const server = createServer(handle)
await once(server.listen(0, '127.0.0.1'), 'listening')
const address = server.address()
if (address === null || typeof address === 'string') throw new Error('the server has no port')
process.stdout.write(`http://127.0.0.1:${address.port}\n`)
