// JavaScript, because the global object of Stryker has no type.

// Stryker does not see what a thread runs. So each test file counts as one that runs every mutant.
const mutantsMax = 1_000
const covered = Object.fromEntries(Array.from({ length: mutantsMax }, (_, id) => [id, 1]))
globalThis.__stryker__.mutantCoverage = { static: covered, perTest: {} }
