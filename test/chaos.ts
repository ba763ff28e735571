/*
 * npm run chaos: clients that retry sign up at two instances, and some of them then change their password or delete their account. At
 * random instances are killed and paused, Postgres is restarted or replaced by its standby, connections are reset and stalled, and the
 * receiver of events fails. Then every answer to every client, and every event, is compared with the rows.
 *
 * CHAOS_SECONDS (60) is the duration, CHAOS_SEED (random, printed) repeats the sequence of faults. CHAOS_REPLICATION is
 * `synchronous` (default) or `asynchronous`: then a failover may lose changes, and those who lost their row sign up again. Exits
 * with 1 if anything else was lost, done twice or invented.
 */
import { randomInt } from 'node:crypto'
import { numberFrom } from '../testkit/environment.js'
import { FaultProxy } from '../testkit/fault-proxy.js'
import { startStores } from '../testkit/private-stores.js'
import { ReplicatedPostgres } from '../testkit/replicated-postgres.js'
import { auditEvents, auditRows, drainEvents, findLost } from './chaos/audit.js'
import { eventsSecret, startEventReceiver } from './chaos/event-receiver.js'
import { causeFault } from './chaos/faults.js'
import { askFor, repeat, signUpPeople } from './chaos/people.js'
import { Report } from './chaos/report.js'
import { SeededRandom } from './chaos/seeded-random.js'
import { ServiceInstance } from './chaos/service-instance.js'

const seconds = numberFrom('CHAOS_SECONDS', 60)
const seed = numberFrom('CHAOS_SEED', randomInt(2 ** 31))
const replication = process.env.CHAOS_REPLICATION === 'asynchronous' ? 'asynchronous' : 'synchronous'
process.stdout.write(`chaos: ${seconds} s, CHAOS_SEED=${seed}, CHAOS_REPLICATION=${replication}\n`)

const random = new SeededRandom(seed)
const report = new Report()
const stores = await startStores()
const redisProxy = await FaultProxy.open(stores.redisUrl)
const receiver = await startEventReceiver(random, report)
const receiverProxy = await FaultProxy.open(receiver.url)
const postgres = await ReplicatedPostgres.start(replication)
const env = {
  ...stores.environment,
  REDIS_URL: redisProxy.url,
  DATABASE_URL: postgres.address.url,
  EVENTS_WEBHOOK_URL: receiverProxy.url,
  EVENTS_WEBHOOK_SECRET: eventsSecret,
  HASH_MEMORY_KIB: '4096',
  HASH_PASSES: '1',
  // A short lease, so that claims are taken over.
  HASH_MAX_WAIT_MS: '500',
  STORE_TIMEOUT_MS: '1000',
  MIGRATE: 'false'
}
const instances: [ServiceInstance, ServiceInstance] = [new ServiceInstance(env), new ServiceInstance(env)]
await Promise.all(instances.map((instance) => instance.start()))

const until = Date.now() + seconds * 1_000
const mayLoseRows = replication === 'asynchronous'
const options = { instances, redis: stores.redis, random, report, until, mayLoseRows }

async function causeFaults(): Promise<void> {
  while (Date.now() < until) report.count(await causeFault({ instances, postgres, redisProxy, receiverProxy }, random))
}
const [people] = await Promise.all([signUpPeople(options), causeFaults()])
const lost = mayLoseRows ? await findLost(postgres, people) : []
for (const person of lost) {
  report.count('clients whose row was lost, and who signed up again')
  // Who has gone on has replaced the claim of the first code.
  await (person.passwords.length > 1 ? askFor : repeat)('signUp', person, { ...options, until: Date.now() })
}
receiver.isFaulty = false
await drainEvents(postgres, report)
for (const instance of instances) {
  const failure = await instance.stop()
  if (failure !== undefined) report.violate(`SIGTERM: ${failure}`)
}
await auditRows(postgres, people, report, mayLoseRows)
await auditEvents(postgres, people, receiver.bodies, report, mayLoseRows)
if (people.length === 0) report.violate('nobody has signed up, so nothing was checked')

// The receiver and the proxies end with this process.
await Promise.all([postgres.stop(), stores.stop()])
report.print()
process.stdout.write(`chaos: ${people.length} clients, ${report.violations.length} violations, CHAOS_SEED=${seed}\n`)
process.exit(report.violations.length > 0 ? 1 : 0)
