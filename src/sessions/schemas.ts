import { Type } from '@sinclair/typebox'

const userFields = {
  user_id: Type.String({ description: 'A 64-bit integer', examples: ['1'] }),
  name: Type.String({ description: 'The mobile at first', examples: ['13812345678'] }),
  mobile: Type.String({ examples: ['13812345678'] })
}

/** The user of a session. */
export const SessionUserData = Type.Object(userFields)

/** The data of a reply to a request that starts a session. */
export const LoggedInData = Type.Object({
  ...userFields,
  session: Type.Boolean({
    description: 'False if the user is stored but the session could not be: the client then logs in.',
    examples: [true]
  })
})
