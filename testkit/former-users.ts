/**
 * Hashes of other systems, by their passwords. The libraries themselves have made them (werkzeug 3.1, Django 5.2, bcrypt 5.0 and
 * argon2-cffi 25.1 for Python), with
 *   generate_password_hash(password, method='pbkdf2:sha256:1000'), the same with pbkdf2:sha512:1000 and scrypt:1024:8:1,
 *   PBKDF2PasswordHasher().encode(password, 'saltsalt', 1000),
 *   bcrypt.hashpw(password.encode(), bcrypt.gensalt(4, prefix)), prefix b'2a' or b'2b'; $2y$ is PHP's name for the second,
 *   argon2.PasswordHasher(time_cost=1, memory_cost=64, parallelism=1, type=argon2.Type.I).hash(password), the same with Type.D and Type.ID.
 */
export const formerHashes: Record<string, string[]> = {
  'correct horse': [
    'pbkdf2:sha256:1000$ZtRZf4wZbpMUUGfk$6c0499432bb2ea2375bbcfefa555b0a2a3a0419ca6280fff82e1a662a9ea76c4',
    'pbkdf2:sha512:1000$HFyLSCY61mtmPUbA$1a46c16c0325b716c862e8bca75ddb100cfd077979ee27d2c38c3a4ff5f95439bc2ce7baf21b5f51c6bdf73168fb281858d62b3e7b4f19fc6fc3e0e81ec3cb93',
    'scrypt:1024:8:1$FADa6t5slc9VFrn4$05a6ae640b7a6df7b49a0dfeb91973893c66aec5b6aefd0d0dcd239e0ec90d02a49c29d334f1a47b10aeb3ceee5aa3e792938f926de7037ea745990716f4583d',
    'pbkdf2_sha256$1000$saltsalt$qQDPSZa3Ormyy9oK1Pu0ZLLwP2Svzmx3yu8OvDdq/J0=',
    '$2a$04$7k3.iAHXhPQhToGdg.0muOmXEaqgIXIyOwq.dQAKmSoE5949pjsZG',
    '$2b$04$gxiQ2ArWiKE6s5Qu31ilIuxSoK8c2Kzib9jMdkvCe7pZ1SJOLHfdC',
    '$2y$04$gxiQ2ArWiKE6s5Qu31ilIuxSoK8c2Kzib9jMdkvCe7pZ1SJOLHfdC',
    '$argon2i$v=19$m=64,t=1,p=1$a3mdVzoUiYokwSZ6qZJrAg$pu09GaE1wc3jp/nIezDEZqMF9g1X1x5XSRwqbNyDA6I',
    '$argon2d$v=19$m=64,t=1,p=1$/gEB+qfYoNCP6WZzoZhSLQ$HYshO/53WWaYom8ypfsuitvdlvEK2lsuUZMr7HlB0JQ',
    '$argon2id$v=19$m=64,t=1,p=1$rwmxjxEVCuOQBHAveedAHQ$WFQURCKyxQxxc7Z9BTJpN3UQ2aaylzwfVn5D9muK7uM'
  ],
  // NFKC changes this password. The other systems have hashed it as typed.
  paſſwörd１２: [
    'pbkdf2:sha256:1000$e9zOvuTD9JtNd5KH$4ceb3fbdb53483103cae5e19f07cb6d1f89437633c18312864fda9fbf4de32ac',
    'scrypt:1024:8:1$efB0fGWqX9bYuCg5$049fff91857af9a064582ee84e4f99c7a72f4b8d8f98e9249f5d3ebc2ed7860a1bcbe6eb00f33ee6f36830225cb479c5512c4b9b4cb16256de8773169333a568',
    'pbkdf2_sha256$1000$saltsalt$nSpr0wyEd6bykWHQSLiMiec+B+iUM4TIlnHhx0vHlRg=',
    '$2b$04$bX6ym3UnEUBNzNTda6Tbvex4lnpePpoD5qnpZza3A5XrjsChghM4m',
    '$argon2i$v=19$m=64,t=1,p=1$SBfOzsq+ZYI8z0IvxT+7Pg$MiEdcOoY/yr0PBjeGDOT5q8VmTWjOJ12T2RHnkOZquk'
  ]
}

/** Makes the users of a former system. Their passwords are `correct horse`, and their hashes are of every kind in turn. */
export function formerUsers(count: number): { mobile: string; password_hash: string }[] {
  const hashes = formerHashes['correct horse'] ?? []
  return Array.from({ length: count }, (_, n) => {
    return { mobile: `${13_700_000_000 + n}`, password_hash: hashes[n % hashes.length] ?? '' }
  })
}
