/* The yardstick of a refusal: a Fastify route that returns a constant. Prints its URL when it listens. */
import Fastify from 'fastify'

const app = Fastify()
app.post('/api/v1.0/users', () => ({ errno: '4004', errmsg: '短信验证码错误' }))
process.stdout.write(`${await app.listen({ port: 0, host: '127.0.0.1' })}\n`)
