import { type Static, Type } from '@sinclair/typebox'
import type { FastifyRequest } from 'fastify'
import { presentedMaxLength } from '../codes/code-format.js'
import { ticketMaxLength } from '../codes/tickets.js'
import { bodyOutcomes, mobileField, requiredText } from '../http/schemas.js'
import { newPasswordField } from '../passwords/policy.js'

/** The body of a request that sets a password with a code. */
export const NewPasswordBody = Type.Object({
  mobile: mobileField,
  sms_code: Type.String({ ...requiredText, maxLength: presentedMaxLength, examples: ['123456'] }),
  password: newPasswordField,
  password2: newPasswordField,
  ticket: Type.Optional(
    Type.String({
      maxLength: ticketMaxLength,
      examples: ['b2Zo1cNvTtQx.mf3k2p1q.Xq8mJ0Vw3eVdS1JxuC5Vb8o0cC7wU0kYy2bF1m9rPzE'],
      description: 'From `POST /sms_codes`. One that is forged, expired or for another mobile counts as absent.'
    })
  )
})

export type NewPasswordRequest = FastifyRequest<{ Body: Static<typeof NewPasswordBody> }>

/** The outcomes of such a request, except its successes. */
export const newPasswordOutcomes = [
  ...bodyOutcomes,
  'passwords_differ',
  'password_length',
  'password_common',
  'wrong_code',
  'too_many_requests'
] as const
