-- Version 2 of the tables of outbox and inbox, for PostgreSQL 15 or later: run after 1.sql.

-- Calls of handlers to somebody else that began, and have not ended.
CREATE TABLE evt.intent (
  consumer text COLLATE "C" NOT NULL,
  message_id uuid NOT NULL,
  runs integer NOT NULL DEFAULT 1,
  begun_at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (consumer, message_id)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000);

-- How long an owner's lease is, so that one which the server's clock made longer by going back is none. Owners that do not say
-- are of the first version, and may have the longest.
ALTER TABLE evt.outbox_shard ADD COLUMN lease_seconds double precision NOT NULL DEFAULT 600;

UPDATE evt.meta SET value = '2' WHERE name = 'version';
