export { type BuildOptions, buildApp, type MobileSignup, type SignUpOptions, signUp } from './app.js'
export { type Config, ConfigError, type Environment, loadConfig } from './config/config.js'
export { migrate } from './stores/migrations.js'
