/** Returns the message of an error and of each of its causes, for a line on standard error. */
export function messagesOf(error: unknown): string[] {
  if (!(error instanceof Error)) return []
  // An AggregateError of a connection to several addresses has no message.
  const message = error.message || ('code' in error ? `${error.code}` : error.name)
  return [message, ...messagesOf(error.cause)]
}
