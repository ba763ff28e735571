-- A password reset and a logout everywhere increment it. A session with an older epoch has ended.
SET LOCAL lock_timeout = '5s';
ALTER TABLE users ADD COLUMN session_epoch integer NOT NULL DEFAULT 0;
