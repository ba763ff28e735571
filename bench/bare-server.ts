/*
 * The yardstick of everything but the hash: a node:http program without a framework that makes the same round trips to
 * the same stores, trusts what it gets, and hashes nothing. Prints its URL.
 */
import { randomBytes } from 'node:crypto'
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import { Redis } from 'ioredis'
import pg from 'pg'

const redis = new Redis(process.env.REDIS_URL ?? '')
const pool = new pg.Pool({ connectionString: process.env.DATABASE_URL ?? '', max: 10 })

const insertUser = {
  name: 'insert_user',
  text: `INSERT INTO users (name, mobile, password_hash) VALUES ($1, $1, $2)
         ON CONFLICT (mobile) DO NOTHING RETURNING id`
}
const phc = '$argon2id$v=19$m=19456,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA'

async function signUp(body: string): Promise<{ status: number; sid: string; reply: string }> {
  const { mobile, sms_code } = JSON.parse(body)
  if ((await redis.getdel(`sms_code_${mobile}`)) !== sms_code) return { status: 422, sid: '', reply: '{}' }
  const { rows } = await pool.query({ ...insertUser, values: [mobile, phc] })
  if (rows.length === 0) return { status: 409, sid: '', reply: '{}' }
  const sid = randomBytes(24).toString('base64url')
  const user = { user_id: rows[0].id, name: mobile, mobile }
  await redis.set(`session:${sid}`, JSON.stringify(user), 'EX', 86_400)
  return {
    status: 201,
    sid,
    reply: JSON.stringify({ errno: '0', errmsg: '注册成功', data: { ...user, session: true } })
  }
}

function answer(request: IncomingMessage, response: ServerResponse): void {
  let body = ''
  request.setEncoding('utf8')
  request.on('data', (chunk) => {
    body += chunk
  })
  request.on('end', async () => {
    const { status, sid, reply } = await signUp(body)
    const headers = { 'content-type': 'application/json; charset=utf-8', 'content-length': Buffer.byteLength(reply) }
    response.writeHead(status, { ...headers, 'set-cookie': `sid=${sid}; Path=/; HttpOnly` }).end(reply)
  })
}

const server = createServer(answer).listen(0, '127.0.0.1', () => {
  process.stdout.write(`http://127.0.0.1:${(server.address() as AddressInfo).port}\n`)
})
