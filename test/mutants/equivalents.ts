import type { Equivalents } from './summary.js'

/** Mutants that no test can find, by the reason. Each is written as the run prints it. */
export const equivalents: readonly Equivalents[] = [
  {
    reason: 'The number comes from the script, and is that of a budget in the list. The check is for the types.',
    mutants: ['src/codes/codes.ts: if («spent !== undefined → true») observer?.onLimitReached(spent.name)']
  },
  {
    reason: 'The Retry-After of the outcome is the whole pause. It differs only in seconds from the rest of the pause.',
    mutants: [
      "src/codes/routes.ts: if (pauseSeconds > 0) return reply.outcome('sms_gateway_unavailable', «{ retryAfterSeconds: pauseSeconds } → {}»)"
    ]
  },
  {
    reason: 'Without an observer it throws another error, which is answered alike. Only the log differs.',
    mutants: [
      'src/codes/sms.ts: if (!(error instanceof MessageNotSent)) «observer?.onCodeSent → observer.onCodeSent»()'
    ]
  },
  {
    reason: 'It is a part of the message of an error, for the log only.',
    mutants: [
      // biome-ignore lint/suspicious/noTemplateCurlyInString: the placeholder is part of the mutant
      'src/codes/senders/webhook.ts: const message = `the SMS webhook did not answer: ${signal.aborted ? «\'timeout\' → ""» : errorCodeOf(error)}`'
    ]
  },
  {
    reason: 'The chunks of a body are thrown away.',
    mutants: ['src/codes/senders/webhook.ts: for await (const chunk of body ?? «[] → ["Stryker was here"]») {']
  },
  {
    reason: 'fetch gives its errors a cause that is not null.',
    mutants: [
      "src/codes/senders/webhook.ts: return typeof cause === 'object' && «cause !== null → true» && 'code' in cause ? String(cause.code) : 'unknown'"
    ]
  },
  {
    reason: 'A ticket with fewer parts has no valid MAC, whatever stands for the absent parts.',
    mutants: [
      "src/codes/tickets.ts: const [id = «'' → \"Stryker was here!\"», expiry = '', mac = ''] = ticket.split('.')",
      "src/codes/tickets.ts: const [id = '', expiry = «'' → \"Stryker was here!\"», mac = ''] = ticket.split('.')",
      "src/codes/tickets.ts: const [id = '', expiry = '', mac = «'' → \"Stryker was here!\"»] = ticket.split('.')"
    ]
  },
  {
    reason: 'A text without a valid signature is as good as no cookie.',
    mutants: [
      'src/sessions/load-session.ts: const { value } = secret.unsign(request.cookies[cookieName] ?? «\'\' → "Stryker was here!"»)',
      'src/sessions/sessions.ts: const formerId = signer.unsign(request.cookies[cookieName] ?? «\'\' → "Stryker was here!"»).value'
    ]
  },
  {
    reason: 'A thread answers only the jobs that it has. The check is for the types.',
    mutants: ['src/passwords/hash-pool.ts: if («job === undefined → false») return']
  },
  {
    reason: 'The tests run on Linux.',
    mutants: [
      "src/passwords/hash-thread.js: if («process.platform === 'linux' → true») setPriority(Math.min(constants.priority.PRIORITY_LOW, getPriority() + niceness))"
    ]
  },
  {
    reason: 'In a thread the port of the parent is never null. The check is for the types.',
    mutants: [
      "src/passwords/hash-thread.js: «parentPort?.on → parentPort.on»('message', (/** @type {import('./hash-pool.js').HashJob} */ { password, phc }) => {",
      'src/passwords/hash-thread.js: «parentPort?.postMessage → parentPort.postMessage»({ ...compute(), startedAt, endedAt: nowMs() })',
      "src/passwords/hash-thread.js: «parentPort?.postMessage → parentPort.postMessage»('ready')"
    ]
  },
  {
    reason: 'Neither text says that huge pages are off.',
    mutants: [
      "src/passwords/huge-pages.ts: const setting = await readFile(settingFile, 'utf8').catch(() => «'' → \"Stryker was here!\"»)"
    ]
  },
  {
    reason: 'Nobody knows the random password of the decoy, so it never matches.',
    mutants: ['src/passwords/passwords.ts: return matches && «phc !== undefined → true»']
  },
  {
    reason: 'Node gives each request a target.',
    mutants: [
      'src/sessions/load-session.ts: request.raw.url = originForm(request.raw.url ?? «\'\' → "Stryker was here!"»)'
    ]
  },
  {
    reason: 'Only for the interface of @fastify/session, which stores a session only if a route has changed it.',
    mutants: ['src/sessions/sessions.ts: set(_sessionId, _session, done) «{ … } → {}»,']
  },
  {
    reason: 'What is absent counts as false. The caught error is for the log only.',
    mutants: [
      'src/users/redeem-code.ts: endReplay(«{ passwordWasWrong: false } → {}»)',
      'src/users/redeem-code.ts: await endReplay(«{ passwordWasWrong: false } → {}»)',
      'src/users/redeem-code.ts: } catch (err) «{ … } → {}»'
    ]
  },
  {
    reason: 'Without a name, Postgres parses the statement each time.',
    mutants: ['src/users/users.ts: name: «\'replace_hash\' → ""»,']
  },
  {
    reason: 'Every key of the table is the name of an outcome. The filter is for the types.',
    mutants: [
      'src/outcomes.ts: export const outcomeNames = «Object.keys(outcomes).filter(isOutcomeName) → Object.keys(outcomes)»'
    ]
  }
]
