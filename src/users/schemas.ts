import { type Static, Type } from '@sinclair/typebox'
import type { FastifyRequest } from 'fastify'
import { presentedMaxLength } from '../codes/code-format.js'
import { bodyOutcomes, mobileField, requiredText } from '../http/schemas.js'
import { newPasswordField } from '../passwords/policy.js'

export const ticketField = Type.String({
  maxLength: 256,
  examples: ['b2Zo1cNvTtQx.mf3k2p1q.Xq8mJ0Vw3eVdS1JxuC5Vb8o0cC7wU0kYy2bF1m9rPzE'],
  description: 'From `POST /sms_codes`. One that is forged, expired or for another mobile counts as absent.'
})

/** The body of a request that presents a code. */
export const CodeBody = Type.Object({
  mobile: mobileField,
  sms_code: Type.String({ ...requiredText, maxLength: presentedMaxLength, examples: ['123456'] }),
  ticket: Type.Optional(ticketField)
})

/** The body of a request that sets a password with a code. */
export const NewPasswordBody = Type.Object({
  ...CodeBody.properties,
  password: newPasswordField,
  password2: newPasswordField
})

export type CodeBodyRequest = FastifyRequest<{ Body: Static<typeof CodeBody> }>
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
