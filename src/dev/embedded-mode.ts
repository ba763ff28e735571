/** What a first run without any store URL adds to the service. `server.ts` loads it only then. */
export { demoBanner, prettyLog } from './demo.js'
export { EmbeddedStores } from './embedded-stores.js'
