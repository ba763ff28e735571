-- What a Citus cluster needs beyond sql/. Run it once with psql, on the coordinator, after `npm run migrate`:
--
--   psql "$DATABASE_URL" -v ON_ERROR_STOP=1 -f deploy/citus.sql
--
-- Later migrations run on the coordinator, too. deploy/try-citus.sh tests this file on a cluster of three nodes.

-- The notices of Citus ask for what the last two statements do.
SET client_min_messages = warning;

BEGIN;
SET LOCAL lock_timeout = '5s';

-- Returns the id of a new user: 41 bits of milliseconds since 2024, 6 bits of the node, 16 bits of a counter.
--
-- The unique constraints of a distributed table contain its distribution column, so no constraint finds two users with one id.
-- The ids themselves must differ:
--
-- * Between nodes by the node. Citus gives each node a sequence of its own, in which node group g counts from g * 2^48 + 1 and
--   the coordinator, group 0, from 0. The default in sql/ would put these high bits into the time, and would let the counter
--   of a worker grow into it.
-- * On one node by the time and the counter. The node that receives an INSERT evaluates the default, also for rows of other
--   nodes' shards, so both are of this node. The 16 bits wrap after 65,536 ids, for which a node has a millisecond: no node
--   inserts 65 million rows in a second.
--
-- Users that exist keep their ids. New ids are of a later time, if the clocks of the nodes agree (NTP).
--
-- Groups count up and are never given again. So 63 workers can be added in the life of a cluster, and then an error is better
-- than a duplicate. A worker that is replaced by its standby keeps its group (citus_update_node).
CREATE FUNCTION make_user_id(counter bigint) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
  node_group bigint := counter >> 48;
BEGIN
  IF node_group > 63 THEN
    RAISE EXCEPTION 'an id has 6 bits for the node, too few for node group %', node_group;
  END IF;
  RETURN ((extract(epoch FROM clock_timestamp()) * 1000)::bigint - 1704067200000) << 22
    | (node_group << 16)
    | (counter & 65535);
END
$$;

ALTER TABLE users
  ALTER COLUMN id SET DEFAULT make_user_id(nextval('user_id_counter')),
  DROP CONSTRAINT users_pkey,
  DROP CONSTRAINT users_mobile_key,
  ADD PRIMARY KEY (mobile);

-- One mobile is one row of one shard, so each statement of the service is the work of one node.
SELECT create_distributed_table('users', 'mobile');
-- An instance reads it at the start if MIGRATE is true, also one whose DATABASE_URL is a worker.
SELECT create_reference_table('mobile_signup_migrations');
COMMIT;

-- Rows that were in the tables before have been copied to the shards.
SELECT truncate_local_data_after_distributing_table('users');
SELECT truncate_local_data_after_distributing_table('mobile_signup_migrations');
