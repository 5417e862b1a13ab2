-- Version 1 of the tables of outbox and inbox, for PostgreSQL 15 or later. `migrate()` runs this text with the schema
-- of your choice in place of `evt`; who migrates by other means runs it as it is.
CREATE SCHEMA IF NOT EXISTS evt;

CREATE TABLE evt.meta (name text PRIMARY KEY, value text NOT NULL);

-- Events that wait to be published, in the order of `id` for each topic and key. An event without a key has its own id
-- as one. `head` is what else the event says, as JSON.
CREATE TABLE evt.outbox (
  -- Numbers from a cache of a session would not be in the order of the locks.
  id bigint GENERATED ALWAYS AS IDENTITY (CACHE 1),
  shard smallint NOT NULL CHECK (shard BETWEEN 0 AND 63),
  event_id uuid NOT NULL,
  topic text COLLATE "C" NOT NULL,
  key bytea NOT NULL,
  has_key boolean NOT NULL DEFAULT true,
  head json NOT NULL,
  payload bytea,
  size integer NOT NULL CHECK (size >= 0),
  created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (shard, id)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000, autovacuum_vacuum_cost_delay = 0,
  vacuum_truncate = off);

-- Who publishes which events: one relay a shard, under an epoch that grows with every change.
CREATE TABLE evt.outbox_shard (
  shard smallint PRIMARY KEY,
  owner text,
  epoch bigint NOT NULL DEFAULT 0,
  lease_until timestamptz NOT NULL DEFAULT '-infinity'
) WITH (fillfactor = 50);
INSERT INTO evt.outbox_shard (shard) SELECT generate_series(0, 63);

CREATE TABLE evt.outbox_relay (
  relay text PRIMARY KEY,
  seen_at timestamptz NOT NULL
) WITH (fillfactor = 50);

-- Keys whose first event could not be published. The others of the key wait behind it.
CREATE TABLE evt.outbox_blocked (
  shard smallint NOT NULL,
  topic text COLLATE "C" NOT NULL,
  key bytea NOT NULL,
  head_id bigint NOT NULL,
  attempts integer NOT NULL,
  may_pass boolean NOT NULL,
  retry_at timestamptz NOT NULL,
  error text NOT NULL,
  PRIMARY KEY (shard, topic, key)
);

-- Events that were set aside because they can never be published, or by an operator.
CREATE TABLE evt.outbox_parked (
  id bigint PRIMARY KEY,
  shard smallint NOT NULL,
  event_id uuid NOT NULL,
  topic text COLLATE "C" NOT NULL,
  key bytea NOT NULL,
  has_key boolean NOT NULL,
  head json NOT NULL,
  payload bytea,
  size integer NOT NULL,
  created_at timestamptz NOT NULL,
  attempts integer NOT NULL,
  error text NOT NULL,
  parked_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Stores events, in their order. It must be the last statement before COMMIT: the locks of the keys are held until then.
-- Returns the transaction's id, by which a commit without an answer can be found out.
CREATE FUNCTION evt.outbox_append(topics text[], keys bytea[], have_keys boolean[], ids uuid[], heads text[], payloads bytea[],
  sizes integer[]) RETURNS xid8 LANGUAGE plpgsql AS $$
DECLARE
  stripe integer;
  transaction xid8;
BEGIN
  -- 1. One transaction at a time for each key, so that the order of commits is the order of numbers. Locks are taken in one
  --    order, so that no two transactions wait for each other.
  FOR stripe IN
    SELECT DISTINCT (hashtextextended(t || chr(1) || encode(k, 'hex'), 0) >> 8 & 65535)::integer
    FROM unnest(topics, keys, have_keys) AS e (t, k, has) WHERE has ORDER BY 1
  LOOP
    PERFORM pg_advisory_xact_lock('evt.outbox'::regclass::oid::bigint::bit(32)::integer, stripe);
  END LOOP;
  -- 2. The transaction has a number before any event has one: what is below a relay's floor is all there.
  transaction := pg_current_xact_id();
  -- 3. What a relay sees must not vanish with the server.
  IF current_setting('synchronous_commit') IN ('off', 'local') THEN
    PERFORM set_config('synchronous_commit', 'on', true);
  END IF;
  -- 4. Numbers only now, under the locks.
  INSERT INTO evt.outbox (shard, event_id, topic, key, has_key, head, payload, size)
  SELECT (hashtextextended(t || chr(1) || encode(k, 'hex'), 0) & 63)::smallint, i, t, k, has, h::json, p, s
  FROM unnest(topics, keys, have_keys, ids, heads, payloads, sizes) WITH ORDINALITY AS e (t, k, has, i, h, p, s, n)
  ORDER BY n;
  RETURN transaction;
END $$;

-- What was handled, for each consumer: service.handler@generation.
CREATE TABLE evt.inbox (
  consumer text COLLATE "C" NOT NULL,
  message_id uuid NOT NULL,
  seen_at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (consumer, message_id)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000, autovacuum_vacuum_insert_scale_factor = 0,
  autovacuum_vacuum_insert_threshold = 100000);
-- Rows are nearly in the order of their time, so that a few bytes for each range of pages find the old ones.
CREATE INDEX inbox_by_time ON evt.inbox USING brin (seen_at) WITH (pages_per_range = 16, autosummarize = on);

-- How far each key of a source was handled.
CREATE TABLE evt.key_progress (
  consumer text COLLATE "C" NOT NULL,
  source text COLLATE "C" NOT NULL,
  key bytea NOT NULL,
  last_seq bigint NOT NULL,
  seen_at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (consumer, source, key)
) WITH (fillfactor = 70);

-- How each consumer remembers, and for how long.
CREATE TABLE evt.consumer (
  consumer text COLLATE "C" PRIMARY KEY,
  memory text NOT NULL,
  remembers_seconds bigint NOT NULL
);

INSERT INTO evt.meta VALUES ('version', '1');
