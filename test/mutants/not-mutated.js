// JavaScript, because Stryker imports it.

/**
 * The part of Babel's `NodePath` that this file uses. `toString` returns the source of the node.
 *
 * @typedef {{ node: { type: string }, parentPath: Path | null, toString(): string }} Path
 */

/**
 * Stryker does not change a node that has one of the types of a rule and that the rule matches.
 *
 * @type {{ types: string[], matches(path: Path): boolean, reason: string }[]}
 */
const rules = [
  {
    types: ['TemplateLiteral'],
    matches: (path) => `${path}`.includes('redis.call('),
    reason: '`npm run mutation:lua` changes the Lua scripts. An empty script is no interesting mutant.'
  },
  {
    types: ['CallExpression'],
    matches: (path) => /^([\w.]+\.)?log(\.(info|warn|error)|Un\w+)\(/.test(`${path}`),
    reason: 'No promise is about the text of a log line. That it names nobody is checked at the end of each test file.'
  },
  {
    types: ['ArrowFunctionExpression', 'BlockStatement'],
    matches: (path) => /^(\(?err\)? =>|\{)\s*([\w.]+\.)?log[\w.]*\([^;]*\);?\s*\}?$/.test(`${path}`),
    reason: 'It only writes to the log.'
  },
  {
    types: ['StringLiteral', 'TemplateLiteral'],
    matches: ({ parentPath }) => /^new (Error|MessageNotSent|MessageRefused)\(/.test(`${parentPath}`),
    reason: 'The message of an error is for the log only.'
  },
  {
    types: ['ObjectProperty', 'ObjectExpression'],
    matches: (path) =>
      /^(\{\s*description: '[^']*'\s*\}$|(description|examples|operationId|summary|tags):)/.test(`${path}`),
    reason: 'It describes the API for people.'
  },
  {
    types: ['ObjectExpression'],
    matches: (path) => /^\{\s*fastify: '5\.x'/.test(`${path}`),
    reason: 'Fastify checks the options of a plugin when it is registered. They change nothing else.'
  }
]

export const strykerPlugins = [
  {
    kind: 'Ignore',
    name: 'not-mutated',
    value: {
      /** @param {Path} path */
      shouldIgnore: (path) =>
        rules.find(({ types, matches }) => types.includes(path.node.type) && matches(path))?.reason
    }
  }
]
