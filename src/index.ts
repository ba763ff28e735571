export { buildApp, signUp } from './app.js'
export { type Config, ConfigError, type Environment, loadConfig } from './config.js'
export { migrate } from './migrations.js'
