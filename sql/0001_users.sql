CREATE TABLE users (
  id            bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  name          text        NOT NULL,
  mobile        text        NOT NULL UNIQUE,
  password_hash text        NOT NULL, -- PHC string
  created_at    timestamptz NOT NULL DEFAULT now()
);
