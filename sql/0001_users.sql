-- An id is time and a counter: 41 bits of milliseconds since 2024, then 22 bits of a sequence. After a failover or a restore
-- the sequence may have gone back, because Postgres logs it 32 values ahead. The time has not, so no id is given twice.
CREATE SEQUENCE user_id_counter AS integer MINVALUE 0 MAXVALUE 4194303 CYCLE;
-- Not from 0: the counter in the newest id would be the number of users.
SELECT setval('user_id_counter', floor(random() * 4194304)::integer);
-- A role that may only insert users needs it. An identity column would need no such grant.
GRANT USAGE ON SEQUENCE user_id_counter TO PUBLIC;

CREATE TABLE users (
  id            bigint      PRIMARY KEY DEFAULT
    ((extract(epoch FROM clock_timestamp()) * 1000)::bigint - 1704067200000) << 22 | nextval('user_id_counter'),
  name          text        NOT NULL,
  mobile        text        NOT NULL UNIQUE,
  password_hash text        NOT NULL, -- PHC string
  created_at    timestamptz NOT NULL DEFAULT now(),
  -- A password reset and a logout everywhere raise it. A session with an older epoch has ended.
  session_epoch integer     NOT NULL DEFAULT 0
);
ALTER SEQUENCE user_id_counter OWNED BY users.id;

-- What other services are told of users (EVENTS_WEBHOOK_URL). A row is written in the statement that changes the user, and is deleted
-- when the receiver has accepted it.
CREATE TABLE user_events (
  id         uuid        NOT NULL DEFAULT gen_random_uuid(), -- the webhook-id
  number     bigint      GENERATED ALWAYS AS IDENTITY,       -- the order of the events of a user
  user_id    bigint      NOT NULL,
  type       text        NOT NULL,
  mobile     text        NOT NULL,
  name       text        NOT NULL,
  created_at timestamptz NOT NULL DEFAULT now(),
  attempts   integer     NOT NULL DEFAULT 0,
  due_at     timestamptz NOT NULL DEFAULT now(),             -- of the next attempt; infinity: none
  PRIMARY KEY (user_id, number)
);
CREATE INDEX ON user_events (due_at);
