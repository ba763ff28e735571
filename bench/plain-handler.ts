/*
 * The yardstick of a sign-up: what a good engineer writes in an hour with the same packages, as their READMEs show it. It takes the
 * code with GETDEL, and keeps none of the guarantees.
 */
import fastifyCookie from '@fastify/cookie'
import fastifyPostgres from '@fastify/postgres'
import fastifyRedis from '@fastify/redis'
import fastifySession from '@fastify/session'
import { hash } from '@node-rs/argon2'
import { type Static, Type } from '@sinclair/typebox'
import Fastify from 'fastify'
import { defaultParameters } from './bare-hashes.js'

declare module 'fastify' {
  interface Session {
    user?: { user_id: string; name: string; mobile: string }
  }
}

const SignUpBody = Type.Object({
  mobile: Type.String({ pattern: '^1[3-9]\\d{9}$' }),
  sms_code: Type.String({ minLength: 1, maxLength: 16 }),
  password: Type.String({ minLength: 8, maxLength: 128 }),
  password2: Type.String()
})

const { DATABASE_URL = '', REDIS_URL = '', SESSION_SECRET = '', PORT } = process.env
const dayMs = 86_400_000
const argon2id = { memoryCost: defaultParameters.memoryKib, timeCost: defaultParameters.passes, parallelism: 1 }

const app = Fastify({ logger: { level: 'warn' } })
await app.register(fastifyPostgres, { connectionString: DATABASE_URL })
await app.register(fastifyRedis, { url: REDIS_URL })
await app.register(fastifyCookie)
await app.register(fastifySession, {
  secret: SESSION_SECRET,
  cookie: { secure: 'auto', httpOnly: true, sameSite: 'lax', maxAge: dayMs },
  saveUninitialized: false,
  store: {
    get: (id, done) => app.redis.get(`session:${id}`).then((json) => done(null, json && JSON.parse(json)), done),
    set: (id, session, done) =>
      app.redis.set(`session:${id}`, JSON.stringify(session), 'PX', dayMs).then(() => done(), done),
    destroy: (id, done) => app.redis.del(`session:${id}`).then(() => done(), done)
  }
})

app.post<{ Body: Static<typeof SignUpBody> }>(
  '/api/v1.0/users',
  { schema: { body: SignUpBody } },
  async (request, reply) => {
    const { mobile, sms_code, password, password2 } = request.body
    if (password !== password2) return reply.code(400).send({ errno: '4103', errmsg: '两次密码不一致' })
    const code = await app.redis.getdel(`sms_code_${mobile}`)
    if (code !== sms_code) return reply.code(422).send({ errno: '4004', errmsg: '短信验证码错误' })
    const { rows } = await app.pg.query<{ id: string }>(
      'INSERT INTO users (name, mobile, password_hash) VALUES ($1, $1, $2) ON CONFLICT (mobile) DO NOTHING RETURNING id',
      [mobile, await hash(password, argon2id)]
    )
    if (rows[0] === undefined) return reply.code(409).send({ errno: '4003', errmsg: '手机号已存在' })
    request.session.user = { user_id: rows[0].id, name: mobile, mobile }
    await request.session.save()
    return reply.code(201).send({ errno: '0', errmsg: '注册成功', data: { ...request.session.user, session: true } })
  }
)

await app.listen({ port: Number(PORT), host: '127.0.0.1' })
