# An exact tag. Add the digest after the first pull; dependabot updates both.
FROM node:24.21.0-bookworm-slim AS base
WORKDIR /app

FROM base AS build
COPY package.json package-lock.json ./
RUN npm ci --ignore-scripts
COPY tsconfig.json tsconfig.build.json ./
COPY src src
RUN npm run build

FROM base AS dependencies
COPY package.json package-lock.json ./
RUN npm ci --omit=dev --ignore-scripts

FROM base
# IPv6 and IPv4.
ENV NODE_ENV=production HOST=:: PORT=3000
COPY --from=dependencies /app/node_modules node_modules
COPY --from=build /app/dist dist
COPY package.json ./
COPY sql sql
USER node
EXPOSE 3000
# Liveness, not readiness: replacing the container does not bring a store back. The service listens when both stores answer.
# The probe ends by itself, because an engine's timeout may leave it running.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
  CMD ["node", "-e", "fetch('http://127.0.0.1:' + (process.env.PORT || 3000) + '/health/live', { signal: AbortSignal.timeout(2000) }).then(({ ok }) => process.exit(ok ? 0 : 1), () => process.exit(1))"]
# node itself is process 1, because npm forwards no signals. server.ts handles SIGTERM.
CMD ["node", "dist/server.js"]
