// JavaScript, because the global object of Stryker has no type.

// Stryker does not see what a thread runs. So this reports that every test file runs every mutant.
const mutantsMax = 1_000
const covered = Object.fromEntries(Array.from({ length: mutantsMax }, (_, id) => [id, 1]))
globalThis.__stryker__.mutantCoverage = { static: covered, perTest: {} }
